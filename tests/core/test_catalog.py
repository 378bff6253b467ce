"""Which models there are, and which workers may be routed together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2pdyn.core.catalog import Catalog
from p2pdyn.core.types import LOADING, READY, NodeId, PeerInfo, ServedModel

IDS = [NodeId(letter * 16) for letter in "abcdefgh"]


def peer(fingerprint: str = "f1", state: str = READY, name: str = "m") -> PeerInfo:
    served = ServedModel(name, "card", fingerprint, 16, 1024)
    return PeerInfo("n", "0", "aggregated", "sim", state=state, models=(served,), requests_port=1, events_port=2)


def test_first_ready_worker_sets_the_fingerprint() -> None:
    catalog = Catalog(600.0)
    catalog.refresh([(IDS[0], peer("f1")), (IDS[1], peer("f2"))], 0.0)
    assert list(catalog.models["m"].workers) == [IDS[0]]
    assert "f1" in catalog.incompatible[IDS[1]]
    assert "f2" in catalog.incompatible[IDS[1]]
    assert "weights" in catalog.incompatible[IDS[1]]
    catalog.refresh([(IDS[1], peer("f2"))], 1.0)
    assert list(catalog.models["m"].workers) == [IDS[1]]
    assert catalog.incompatible == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [({"block_size": 32}, "block sizes 16 and 32"), ({"card": "other"}, "model cards card and other")],
)
def test_an_incompatible_worker_is_told_what_differs(change: dict[str, Any], words: str) -> None:
    catalog = Catalog(600.0)
    odd = peer("f2")
    odd = replace(odd, models=(replace(odd.models[0], **change),))
    catalog.refresh([(IDS[0], peer("f1")), (IDS[1], odd)], 0.0)
    assert words in catalog.incompatible[IDS[1]]


def test_a_restarted_worker_may_bring_a_new_fingerprint_when_it_is_alone() -> None:
    catalog = Catalog(600.0)
    catalog.refresh([(IDS[0], peer("f1"))], 0.0)
    catalog.refresh([(IDS[0], peer("f2"))], 1.0)
    assert catalog.models["m"].fingerprint == "f2"
    assert list(catalog.models["m"].workers) == [IDS[0]]


def test_only_ready_workers_are_listed_and_a_model_stays_known() -> None:
    catalog = Catalog(600.0)
    catalog.refresh([(IDS[0], peer(state=LOADING))], 0.0)
    assert catalog.models == {}
    catalog.refresh([(IDS[0], peer()), (IDS[1], replace(peer(), role="frontend"))], 1.0)
    assert list(catalog.models["m"].workers) == [IDS[0]]
    catalog.refresh([], 600.0)
    assert catalog.models["m"].workers == {}
    catalog.refresh([], 1200.0)
    assert list(catalog.models) == ["m"]
    catalog.refresh([], 1201.0)
    assert catalog.models == {}


def test_a_model_is_known_from_when_its_last_worker_left_not_from_the_last_change_before() -> None:
    catalog = Catalog(600.0)
    catalog.refresh([(IDS[0], peer())], 0.0)
    catalog.refresh([], 5000.0)  # nothing changed for longer than a model stays known
    catalog.expire(5600.0)
    assert list(catalog.models) == ["m"]
    catalog.expire(5601.0)
    assert catalog.models == {}
