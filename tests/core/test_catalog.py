"""Which models there are, and which workers may be routed together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2pdyn.core.catalog import Catalog
from p2pdyn.core.types import LOADING, READY, NodeId, PeerInfo, ServedModel

IDS = [NodeId(letter * 16) for letter in "abcdefgh"]


def peer(
    fingerprint: str = "f1", state: str = READY, name: str = "m", role: str = "aggregated", moves_kv: str = "ours"
) -> PeerInfo:
    served = ServedModel(name, "card", fingerprint, 16, 1024, moves_kv=moves_kv)
    return PeerInfo("n", "0", role, "sim", state=state, models=(served,), requests_port=1, events_port=2)


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
    [
        ({"block_size": 32}, "block sizes 16 and 32"),
        ({"context": 512, "card": "other"}, "contexts of 1024 and 512 tokens"),
        ({"card": "other"}, "model cards card and other"),
    ],
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


@pytest.mark.parametrize(
    ("workers", "ready", "words"),
    [
        ([("aggregated", "ours")], 1, ""),
        ([("prefill", "ours"), ("decode", "ours")], 1, ""),
        ([("prefill", "ours"), ("decode", "ours"), ("aggregated", "")], 2, ""),
        ([("decode", "ours"), ("aggregated", "ours")], 2, ""),
        ([("prefill", "ours"), ("prefill", "ours")], 0, "prefill workers alone, which answer nothing"),
        ([("prefill", "ours"), ("aggregated", "ours")], 1, "nobody that they could compute for"),
        ([("decode", "ours"), ("decode", "ours")], 2, "decode workers alone, which compute each prompt themselves"),
        ([("prefill", "p2p-nixl+p2p-tcp"), ("decode", "p2p-tcp")], 1, ""),
        ([("prefill", "p2p-nixl"), ("decode", "p2p-tcp")], 1, "no prefill and decode worker that move KV blocks alike"),
        ([("prefill", "ours"), ("decode", "nixl")], 1, "no prefill and decode worker that move KV blocks alike"),
        ([("prefill", ""), ("decode", "")], 1, "no prefill and decode worker that move KV blocks alike"),
    ],
)
def test_what_the_workers_roles_lack_is_told(workers: list[tuple[str, str]], ready: int, words: str) -> None:
    catalog = Catalog(600.0)
    infos = [peer(role=role, moves_kv=moves_kv) for role, moves_kv in workers]
    catalog.refresh(zip(IDS, infos, strict=False), 0.0)
    model = catalog.models["m"]
    assert model.ready == ready
    assert words in model.concern()
    assert bool(words) == bool(model.concern())
    assert not words or "'m'" in model.concern()


def test_a_worker_may_come_back_with_another_role() -> None:
    catalog = Catalog(600.0)
    for role, ready in (("prefill", 0), ("decode", 1), ("aggregated", 1)):
        catalog.refresh([(IDS[0], peer(role=role))], 0.0)
        assert (catalog.models["m"].roles, catalog.models["m"].ready) == ({IDS[0]: role}, ready)
    catalog.refresh([], 1.0)
    assert (catalog.models["m"].roles, catalog.models["m"].ready, catalog.models["m"].concern()) == ({}, 0, "")
