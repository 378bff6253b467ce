"""Policies and the model catalog."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from p2pdyn.core.catalog import Catalog
from p2pdyn.core.router_simple import POLICIES, Target, make_policy
from p2pdyn.core.types import LOADING, READY, Load, NodeId, PeerInfo, ServedModel

IDS = [NodeId(letter * 16) for letter in "abcd"]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_uses_all_equal_workers(name: str) -> None:
    policy = make_policy(name, random.Random(3))
    targets = [Target(worker) for worker in IDS]
    chosen = Counter(policy(targets).worker for _ in range(400))
    assert chosen.keys() == set(IDS)
    assert min(chosen.values()) > 50


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_takes_the_only_one(name: str) -> None:
    assert make_policy(name, random.Random(3))([Target(IDS[0])]).worker == IDS[0]


def test_round_robin_takes_turns() -> None:
    policy = make_policy("round-robin", random.Random(3))
    targets = [Target(worker) for worker in IDS]
    assert sorted(policy(targets).worker for _ in range(4)) == IDS


def test_least_loaded_counts_what_it_sent_since_the_report() -> None:
    policy = make_policy("least-loaded", random.Random(3))
    busy, idle = Target(IDS[0]), Target(IDS[1])
    busy.report(Load(active_requests=3, queued=1))
    assert policy([busy, idle]) is idle
    idle.mine = 5
    assert policy([busy, idle]) is busy


def test_a_report_separates_other_frontends_requests_from_ours() -> None:
    target = Target(IDS[0], mine=2)
    target.report(Load(active_requests=5))
    assert (target.others, target.requests) == (3, 5)
    target.mine = 0
    assert target.requests == 3


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
