"""Blocks that another worker holds: read from it where that is faster than computing them."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import pytest

from p2pdyn.core.disagg import OVERHEAD_S
from p2pdyn.core.flight import Flights
from p2pdyn.core.flight_parts import Dispatch, Transfer
from p2pdyn.core.kvhash import chain, root_seed, sequence_hashes
from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.request import Job, Logprobs, Outcome
from p2pdyn.core.router import Ask, Decision, Router
from p2pdyn.core.router_cost import MISS_WEIGHT
from p2pdyn.core.router_target import Target
from p2pdyn.core.router_tell import explanation, line
from p2pdyn.core.routes import Endpoint, Routes, Serving
from p2pdyn.core.types import Load, NodeId, SamplingParams
from p2pdyn.wire.kvpack import DEVICE

BLOCK = 16
PROMPT = chain(None, list(range(100)))
LOAD = Load(prefill_tps=1000.0, block_bytes=1_000_000, pull_bps=1e9)
"""A block is computed in 16 ms and read in 1 ms."""


class Fleet:
    def __init__(self, size: int, policy: str = "kv") -> None:
        self.index = KvIndex()
        self.targets = [
            Target(NodeId(f"{number:016x}"), slot=self.index.add(), moves_kv="ours") for number in range(size)
        ]
        self.router = Router(policy, random.Random(1), self.index)
        for number in range(size):
            self.report(number)

    def holds(self, number: int, blocks: int) -> None:
        self.index.store(self.targets[number].slot, DEVICE, array("Q", PROMPT[:blocks]))

    def report(self, number: int, **changes: float) -> None:
        self.targets[number].report(replace(LOAD, **changes), 0.0)  # type: ignore[arg-type]

    def ask(self, **changes: object) -> Decision:
        ask = replace(Ask(tokens=100 * BLOCK, hashes=PROMPT, block_size=BLOCK), **changes)  # type: ignore[arg-type]
        told = self.router.explain(ask, self.targets, 0.0)
        decision = self.router.choose(ask, self.targets, 0.0)
        assert decision is not None
        assert told is not None
        assert (told.target, told.pull, told.uncached, told.costs) == (
            decision.target, decision.pull, decision.uncached, decision.costs,
        )  # fmt: skip
        return decision


def test_reading_replaces_computing_in_the_cost_and_in_what_copies_weigh() -> None:
    fleet = Fleet(2)
    fleet.holds(0, 90)
    without = fleet.ask().costs[1]
    assert without == pytest.approx(0.16 + (OVERHEAD_S + 0.09) * MISS_WEIGHT)
    fleet.report(1, pull_bps=0.0)
    assert fleet.ask().costs[1] == pytest.approx(0.16 + 1.44 * MISS_WEIGHT)


def test_a_busy_holder_lends_to_an_idle_worker() -> None:
    fleet = Fleet(2)
    fleet.holds(0, 90)
    assert fleet.ask().pull is None  # the holder itself
    fleet.report(0, prefill_tokens_queued=5000)
    decision = fleet.ask()
    assert decision.target is fleet.targets[1]
    assert decision.pull is not None
    assert tuple(decision.pull) == (fleet.targets[0], 90, pytest.approx(OVERHEAD_S + 0.09), pytest.approx(1.44))
    assert (decision.matched, decision.uncached) == (0, 160)


def test_what_the_reader_has_is_not_read() -> None:
    fleet = Fleet(2)
    fleet.holds(0, 90)
    fleet.holds(1, 40)
    decision = fleet.ask(pin=fleet.targets[1].worker)
    assert decision.pull is not None
    assert tuple(decision.pull) == (fleet.targets[0], 90, pytest.approx(OVERHEAD_S + 0.05), pytest.approx(0.8))
    assert (decision.matched, decision.uncached) == (40, 160)
    told = explanation(fleet.router, "m", decision)
    assert told["pull"] == {
        "worker": fleet.targets[0].worker, "blocks": 50,
        "pull_s": pytest.approx(OVERHEAD_S + 0.05), "compute_s": pytest.approx(0.8),
    }  # fmt: skip
    assert "50 blocks from" in line(fleet.router, decision)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_bytes": 0},  # nothing can be taken from the holder
        {"pull_bps": 0.0},  # the reader cannot
        {"pull_bps": 50e6},  # 20 ms a block
        {"prefill_tps": 1e6},
    ],
)
def test_computing_where_it_is_faster_or_nothing_can_be_read(changes: dict[str, float]) -> None:
    fleet = Fleet(2)
    fleet.holds(0, 90)
    for number in range(2):
        fleet.report(number, **changes)
    decision = fleet.ask(pin=fleet.targets[1].worker)
    assert decision.pull is None
    assert decision.uncached == 1600
    for number in range(2):
        fleet.report(number, **{**changes, "block_bytes": 0, "pull_bps": 0.0})
    assert decision.costs == fleet.ask(pin=fleet.targets[1].worker).costs


def test_the_longest_match_lends_and_of_equals_the_least_busy() -> None:
    fleet = Fleet(4)
    fleet.holds(0, 50)
    fleet.holds(1, 90)
    fleet.holds(2, 90)
    reader = fleet.targets[3].worker
    fleet.report(1, prefill_tokens_queued=5000)
    decision = fleet.ask(pin=reader)
    assert decision.pull is not None
    assert decision.pull.source is fleet.targets[2]
    fleet.report(2, prefill_tokens_queued=9000)
    decision = fleet.ask(pin=reader)
    assert decision.pull is not None
    assert decision.pull.source is fleet.targets[1]
    fleet.report(2, prefill_tokens_queued=5000, active_requests=1)
    fleet.report(1, prefill_tokens_queued=5000, active_requests=2)
    decision = fleet.ask(pin=reader)
    assert decision.pull is not None
    assert decision.pull.source is fleet.targets[2]


def test_nothing_is_read_from_a_worker_that_just_failed_or_is_unlike_or_the_same() -> None:
    fleet = Fleet(2)
    fleet.holds(0, 90)
    assert fleet.ask(exclude=(fleet.targets[0].worker,)).pull is None
    fleet.targets[0].moves_kv = "other"
    assert fleet.ask(pin=fleet.targets[1].worker).pull is None
    fleet.targets[0].moves_kv = "ours"
    fleet.targets[0].worker = fleet.targets[1].worker  # another rank
    fleet.report(0, prefill_tokens_queued=5000)
    assert fleet.ask().pull is None


def test_predicted_blocks_cannot_be_read_yet() -> None:
    fleet = Fleet(2)
    fleet.router.sent("first", fleet.ask(pin=fleet.targets[0].worker), 0.0)
    decision = fleet.ask(pin=fleet.targets[1].worker)
    assert decision.view.matched == [100, 0]
    assert decision.pull is None
    fleet.holds(0, 50)  # half of it is computed
    decision = fleet.ask(pin=fleet.targets[1].worker)
    assert decision.pull is not None
    assert decision.pull.blocks == 50
    assert decision.uncached == 800


def test_a_templates_first_words_are_computed() -> None:
    fleet = Fleet(2)
    for number in range(2):
        fleet.report(number, prefill_tps=100.0)
    fleet.holds(0, 3)
    assert fleet.ask(pin=fleet.targets[1].worker).pull is None
    fleet.holds(0, 4)
    assert fleet.ask(pin=fleet.targets[1].worker).pull is not None


@pytest.mark.parametrize("policy", ["kv-dynamo", "round-robin", "least-loaded"])
def test_other_policies_stay_as_they_are(policy: str) -> None:
    fleet = Fleet(2, policy)
    fleet.holds(0, 90)
    assert fleet.ask(pin=fleet.targets[1].worker).pull is None


class Sink:
    def on_routed(self, worker: NodeId) -> None: ...

    def on_tokens(self, tokens: object, logprobs: Logprobs, cached: int) -> None: ...

    def on_end(self, outcome: Outcome) -> None: ...


def test_the_request_names_the_holder() -> None:
    tokens = array("I", range(1605))
    holder, reader = NodeId("a" * 16), NodeId("b" * 16)
    index = KvIndex()
    flights = Flights(Routes(Router("kv", random.Random(1), index)), lambda data: ())
    rows = tuple(Endpoint(worker, 0, True, moves_kv="ours") for worker in (holder, reader))
    flights.routable({"m": Serving(BLOCK, rows)}, 0.0)
    slot = index.add()
    flights.routes.placed((holder, 0), slot)
    index.store(slot, DEVICE, array("Q", sequence_hashes(tokens.tobytes(), BLOCK, root_seed("", ""))))
    flights.report(holder, 0, replace(LOAD, prefill_tokens_queued=20_000), 0.0)
    flights.report(reader, 0, LOAD, 0.0)
    job = Job("m", tokens, SamplingParams())
    rid, actions = flights.submit(job, Sink(), 0.0)
    assert actions == [Dispatch(reader, rid, 0, job, tokens, uncached=5, transfer=Transfer(holder, 0, 0, 100))]
    assert flights.pulls == 1
    assert flights.cancel(rid, 0.1) != []
