"""Requests whose prompt one worker computes and another goes on with: the two legs, and every way out of them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pdyn.core.flight import MIGRATION_LIMIT, WAIT_S, Flights
from p2pdyn.core.flight_parts import Abandon, Action, Dispatch, Transfer
from p2pdyn.core.kvhash import chain
from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.request import Failure, Job, Logprobs, Outcome
from p2pdyn.core.router import Router
from p2pdyn.core.router_tell import explanation
from p2pdyn.core.routes import Endpoint, Routes, Serving
from p2pdyn.core.types import AGGREGATED, DECODE, PREFILL, Load, NodeId, SamplingParams
from p2pdyn.wire.kvpack import DEVICE
from p2pdyn.wire.requests import Delta, Prefilled

MODEL, BLOCK, EPOCH = "m", 16, 77
P, Q, D, E, A = (NodeId(letter * 16) for letter in "pqdea")
ROLES = {P: PREFILL, Q: PREFILL, D: DECODE, E: DECODE, A: AGGREGATED}
PROMPT = array("I", range(1000, 2600))
"""1600 tokens, 100 blocks."""
LOAD = Load(prefill_tps=10_000.0, block_bytes=1000)


class Recorder:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.cached: list[int] = []
        self.routed: list[NodeId] = []
        self.ends: list[Outcome] = []
        self.cancelled = False

    def on_routed(self, worker: NodeId) -> None:
        assert not self.ends
        assert ROLES[worker] != PREFILL
        self.routed.append(worker)

    def on_tokens(self, tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None:
        assert not self.ends
        assert not self.cancelled
        self.tokens += tokens
        self.cached.append(cached)

    def on_end(self, outcome: Outcome) -> None:
        assert not self.ends
        assert not self.cancelled
        self.ends.append(outcome)


def serving(*workers: NodeId, moves_kv: str = "ours") -> dict[str, Serving]:
    return {MODEL: Serving(BLOCK, tuple(Endpoint(one, 0, True, ROLES[one], moves_kv) for one in workers))}


def make_flights(*workers: NodeId, policy: str = "kv", moves_kv: str = "ours") -> Flights:
    flights = Flights(Routes(Router(policy, random.Random(1), KvIndex())), lambda data: ())
    flights.routable(serving(*workers, moves_kv=moves_kv), 0.0)
    for worker in workers:
        flights.report(worker, 0, LOAD, 0.0)
    return flights


def job(tokens: array[int] = PROMPT, resumable: bool = True, pin: str = "") -> Job:
    return Job(MODEL, tokens, SamplingParams(), resumable=resumable, pin=pin)


def submit(flights: Flights, now: float = 0.0, resumable: bool = True) -> tuple[Recorder, Dispatch]:
    sink = Recorder()
    _, (dispatch,) = flights.submit(job(resumable=resumable), sink, now)
    assert isinstance(dispatch, Dispatch)
    return sink, dispatch


def prefilled(dispatch: Dispatch, lease: int = 9, blocks: int = 100, cached: int = 0, remote: bytes = b"") -> Prefilled:
    return Prefilled(dispatch.rid, dispatch.attempt, EPOCH, lease, blocks, cached, remote)


def delta(dispatch: Dispatch, offset: int, *tokens: int, finish: str = "", cached: int = 0) -> Delta:
    return Delta(dispatch.rid, dispatch.attempt, offset, tokens, finish, cached, b"")


def only(actions: list[Action]) -> Dispatch:
    (dispatch,) = actions
    assert isinstance(dispatch, Dispatch)
    return dispatch


def decoding(flights: Flights, first: Dispatch) -> Dispatch:
    """The decode leg, with the lease of the prefill."""
    return only(flights.prefilled(first.worker, prefilled(first), 0.1))


def nothing_is_left(flights: Flights) -> bool:
    return not flights.open and all(target.mine == 0 == target.my_blocks for target in flights.routes.targets())


# Both legs.


def test_a_prefill_worker_computes_and_a_decode_worker_goes_on() -> None:
    flights = make_flights(P, D)
    sink, first = submit(flights)
    assert first == Dispatch(P, 1, 0, first.job, PROMPT, uncached=1600, hand_over=True)
    assert sink.routed == []
    second = only(flights.prefilled(P, prefilled(first, cached=64), 0.1))
    assert second == Dispatch(D, 1, 1, first.job, PROMPT, uncached=1, transfer=Transfer(P, EPOCH, 9, 100))
    assert flights.open_at(P) == 0
    assert flights.tokens(D, [delta(second, 0, 7, cached=1599)], 0.2) == []
    assert flights.tokens(D, [delta(second, 1, 8, finish="stop")], 0.3) == []
    assert (sink.tokens, sink.routed, sink.cached) == ([7, 8], [D], [64, 0])
    assert sink.ends == [Outcome("stop", (D,))]
    assert (flights.prefills_remote, flights.prefills_local, flights.prefill_fallbacks) == (1, 0, 0)
    assert (flights.prompt_tokens, flights.cached_tokens, flights.migrations) == (1600, 64, 0)
    assert nothing_is_left(flights)


def test_the_last_block_is_computed_by_the_decode_worker() -> None:
    flights = make_flights(P, D)
    _, first = submit(flights)
    assert only(flights.prefilled(P, prefilled(first, blocks=98), 0.1)).uncached == 32


def test_an_engines_own_parameters_travel_as_they_are() -> None:
    flights = make_flights(P, D, moves_kv="nixl")
    _, first = submit(flights)
    second = only(flights.prefilled(P, prefilled(first, lease=0, blocks=0, remote=b"params"), 0.1))
    assert (second.transfer, second.uncached) == (Transfer(P, EPOCH, 0, 0, b"params"), 1)


def test_a_prefill_that_could_not_hold_its_blocks_is_computed_again() -> None:
    flights = make_flights(P, D)
    _, first = submit(flights)
    second = only(flights.prefilled(P, prefilled(first, lease=0, blocks=0), 0.1))
    assert second == Dispatch(D, 1, 1, first.job, PROMPT, uncached=1600)
    assert flights.prefill_fallbacks == 1


def test_loads_of_both_workers() -> None:
    flights = make_flights(P, D)
    there, here = sorted(flights.routes.targets(), key=lambda target: target.role, reverse=True)
    _, first = submit(flights)
    assert (there.my_pending, there.requests, there.mine) == (1600, 1, 1)
    assert (here.my_pending, here.requests, here.decode_blocks) == (0, 1, 100)
    flights.report(D, 0, LOAD, 0.05)  # of before it has come
    assert (here.requests, here.decode_blocks) == (1, 100)
    second = only(flights.prefilled(P, prefilled(first), 0.1))
    assert (there.my_pending, there.requests, there.mine) == (0, 0, 0)
    assert (here.my_pending, here.requests, here.decode_blocks, here.promised) == (1, 1, 100, 0)
    flights.tokens(D, [delta(second, 0, 7)], 0.2)
    assert here.my_pending == 0


# Who takes part.


def test_only_generating_workers_take_requests() -> None:
    flights = make_flights(P, Q, A)
    for _ in range(20):
        _, dispatch = submit(flights)
        assert (dispatch.worker, dispatch.hand_over, dispatch.transfer) == (A, False, None)
    assert (flights.prefills_remote, flights.prefills_local) == (0, 0)


def test_prefill_workers_alone_serve_nobody() -> None:
    flights = make_flights(P, Q)
    assert not flights.routes.serves(MODEL)
    sink = Recorder()
    assert flights.submit(job(), sink, 0.0)[1] == []
    flights.tick(WAIT_S)
    assert sink.ends[0].failure is not None
    assert sink.ends[0].failure.code == "no_ready_worker"


def test_decode_workers_alone_compute_for_themselves() -> None:
    flights = make_flights(D)
    assert flights.routes.serves(MODEL)
    _, dispatch = submit(flights)
    assert (dispatch.worker, dispatch.hand_over) == (D, False)
    assert (flights.prefills_remote, flights.prefills_local) == (0, 1)


@pytest.mark.parametrize(("prefill", "decode"), [("", ""), ("p2p-nixl", "p2p-tcp"), ("nixl", ""), ("", "ours")])
def test_workers_that_do_not_move_kv_alike_are_not_paired(prefill: str, decode: str) -> None:
    flights = make_flights()
    rows = (Endpoint(P, 0, True, PREFILL, prefill), Endpoint(D, 0, True, DECODE, decode))
    flights.routable({MODEL: Serving(BLOCK, rows)}, 0.0)
    assert not submit(flights)[1].hand_over


def test_a_short_prompt_and_one_that_is_cached_stay() -> None:
    flights = make_flights(P, D)
    short = only(flights.submit(job(PROMPT[:16]), Recorder(), 0.0)[1])
    assert (short.worker, short.hand_over) == (D, False)
    index = flights.routes.router._index
    assert isinstance(index, KvIndex)
    slot = index.add()
    flights.routes.placed((D, 0), slot)
    index.store(slot, DEVICE, array("Q", chain(None, list(range(100)))))  # somebody else's
    assert submit(flights)[1].hand_over


def test_the_prefill_worker_that_has_the_prefix_computes() -> None:
    flights = make_flights(P, Q, D)
    seen = []
    for _ in range(5):
        _, first = submit(flights)
        seen.append((first.worker, first.uncached))
        second = only(flights.prefilled(first.worker, prefilled(first), 0.0))
        flights.tokens(D, [delta(second, 0, 7, finish="stop")], 0.0)
        flights.worker_lost(D, "gone", 0.0)  # and its cache with it
        flights.routable(serving(P, Q, D), 0.0)
    assert seen == [(seen[0][0], 1600)] + [(seen[0][0], 1)] * 4  # predicted to be there until events say so


def test_a_pin_names_who_generates() -> None:
    flights = make_flights(P, D, E)
    first = only(flights.submit(job(pin=E), Recorder(), 0.0)[1])
    assert (first.worker, first.hand_over) == (P, True)
    assert only(flights.prefilled(P, prefilled(first), 0.1)).worker == E


@pytest.mark.parametrize("policy", ["round-robin", "least-loaded", "random", "power-of-two"])
def test_every_policy_hands_over_and_keeps_its_turns(policy: str) -> None:
    flights = make_flights(P, D, E, policy=policy)
    seen = []
    for second in range(6):
        _, first = submit(flights, second)
        assert (first.worker, first.hand_over) == (P, True)
        seen.append(only(flights.prefilled(P, prefilled(first), second + 0.2)).worker)
    if policy in ("round-robin", "least-loaded"):
        assert all({one, other} == {D, E} for one, other in zip(seen[::2], seen[1::2], strict=True))


# Ways out.


@pytest.mark.parametrize("others", [(), (Q,)])
def test_a_lost_prefill_worker_is_nothing_to_the_client(others: tuple[NodeId, ...]) -> None:
    flights = make_flights(P, D)
    sink, first = submit(flights, resumable=False)
    flights.routable(serving(P, D, *others), 0.05)
    (second,) = flights.worker_lost(P, "gone", 0.1)
    expected = Dispatch(D, 1, 1, first.job, PROMPT, uncached=1600)
    if others:
        expected = Dispatch(Q, 1, 1, first.job, PROMPT, uncached=1600, hand_over=True)
    assert second == expected
    assert flights.prefilled(P, prefilled(first), 0.2) == [Abandon(P, 1, 0)]
    assert (flights.prefill_fallbacks, flights.migrations, sink.ends) == (1, 0, [])


@pytest.mark.parametrize("code", ["overload", "draining", "epoch", "engine", "invalid"])
def test_a_prefill_worker_that_refuses_is_left_out(code: str) -> None:
    flights = make_flights(P, D)
    sink, first = submit(flights)
    actions = flights.refused(P, first.rid, 0, code, "no", 0.1)
    assert actions == [Abandon(P, 1, 0), Dispatch(D, 1, 1, first.job, PROMPT, uncached=1600)]
    if code == "invalid":  # whose fault that is, the worker that generates says
        assert flights.refused(D, 1, 1, code, "too long", 0.2) == []
        assert sink.ends[0].failure == Failure(400, "invalid_request", "too long")


def test_a_prefill_worker_that_generates_or_ends_is_left_out() -> None:
    flights = make_flights(P, D)
    sink, first = submit(flights)
    assert flights.tokens(P, [delta(first, 0, 7)], 0.1) == [
        Abandon(P, 1, 0),
        Dispatch(D, 1, 1, first.job, PROMPT, uncached=1600),
    ]
    assert sink.tokens == []
    for finish in ("error", "abort", "length"):
        flights = make_flights(P, D)
        sink, first = submit(flights)
        assert only(flights.tokens(P, [delta(first, 0, finish=finish)], 0.1)).worker == D
        assert sink.ends == []


def test_a_prompt_that_kills_prefill_workers_stops() -> None:
    flights = make_flights(P, Q, D)
    sink, dispatch = submit(flights)
    for attempt in range(MIGRATION_LIMIT):
        assert dispatch.attempt == attempt
        dispatch = only(flights.worker_lost(dispatch.worker, "died", 0.1))
        flights.routable(serving(P, Q, D), 0.1)
    assert flights.worker_lost(dispatch.worker, "died", 0.2) == []
    assert [(end.finish, end.migrations) for end in sink.ends] == [("error", 0)]
    assert nothing_is_left(flights)


def test_hand_overs_do_not_count_as_failures() -> None:
    """Each failure may cost two attempts: the number of attempts limits nothing."""
    flights = make_flights(P, D, E)
    sink, first = submit(flights)
    for failures in range(3):
        second = decoding(flights, first)
        flights.tokens(second.worker, [delta(second, failures, 7)], 0.2)
        first = only(flights.worker_lost(second.worker, "died", 0.3))
        assert (first.worker, first.hand_over, first.attempt) == (P, True, 2 * failures + 2)
        assert list(first.tokens) == [*PROMPT, *[7] * (failures + 1)]
        flights.routable(serving(P, D, E), 0.3)
    second = decoding(flights, first)
    flights.tokens(second.worker, [delta(second, 3, 8, finish="stop")], 0.4)
    assert [(end.finish, end.migrations) for end in sink.ends] == [("stop", 3)]


def test_the_decode_worker_died_meanwhile() -> None:
    flights = make_flights(P, D, E)
    sink, first = submit(flights)
    chosen = next(target.worker for target in flights.routes.targets() if target.promised)
    other = D if chosen == E else E
    assert flights.worker_lost(chosen, "gone", 0.05) == []
    second = only(flights.prefilled(P, prefilled(first), 0.1))
    assert (second.worker, second.transfer) == (other, Transfer(P, EPOCH, 9, 100))
    assert sink.routed == [other]


def test_the_decode_worker_filled_up_meanwhile() -> None:
    flights = make_flights(P, D, E)
    _, first = submit(flights)
    chosen = next(target.worker for target in flights.routes.targets() if target.promised)
    flights.report(chosen, 0, Load(queued=1000), 0.05)
    assert only(flights.prefilled(P, prefilled(first), 0.1)).worker == (D if chosen == E else E)


def test_nobody_is_left_to_decode() -> None:
    flights = make_flights(P, D)
    sink, first = submit(flights)
    flights.worker_lost(D, "gone", 0.05)
    assert flights.prefilled(P, prefilled(first), 0.1) == [Abandon(P, 1, 0)]
    assert flights.tick(WAIT_S) == []  # it has waited since 0.1
    again = only(flights.routable(serving(P, D), WAIT_S))
    assert (again.worker, again.attempt, again.hand_over) == (P, 1, True)
    assert sink.ends == []


@pytest.mark.parametrize("how", ["lost", "refused", "hole"])
def test_a_decode_worker_that_takes_over_gets_the_same_blocks(how: str) -> None:
    flights = make_flights(P, D, E)
    sink, first = submit(flights)
    second = decoding(flights, first)
    if how == "lost":
        actions = flights.worker_lost(second.worker, "gone", 0.2)
    elif how == "refused":
        actions = flights.refused(second.worker, 1, 1, "overload", "full", 0.2)
    else:
        actions = flights.tokens(second.worker, [delta(second, 1, 8)], 0.2)
    other = D if second.worker == E else E
    took_over = Dispatch(other, 1, 2, first.job, PROMPT, uncached=1, transfer=second.transfer)
    assert actions == ([] if how == "lost" else [Abandon(second.worker, 1, 1)]) + [took_over]
    flights.tokens(other, [delta(took_over, 0, 7, finish="stop")], 0.3)
    assert sink.ends == [Outcome("stop", (second.worker, other), migrations=1)]
    assert nothing_is_left(flights)


def test_nobody_takes_over_and_the_blocks_are_given_back_at_once() -> None:
    flights = make_flights(P, D)
    _, first = submit(flights)
    decoding(flights, first)
    assert flights.worker_lost(D, "gone", 0.2) == [Abandon(P, 1, 0)]
    assert flights.cancel(1, 0.3) == []


def test_blocks_of_a_lost_or_unlike_worker_are_not_taken() -> None:
    flights = make_flights(P, D, E)
    _, first = submit(flights)
    second = decoding(flights, first)
    flights.worker_lost(P, "gone", 0.2)
    actions = flights.worker_lost(second.worker, "gone", 0.3)
    assert [type(action) for action in actions] == [Abandon, Dispatch]
    assert isinstance(actions[1], Dispatch)
    assert (actions[1].transfer, actions[1].uncached) == (None, 1600)


def test_after_the_first_token_nothing_is_held_any_more() -> None:
    flights = make_flights(P, D)
    _, first = submit(flights)
    second = decoding(flights, first)
    flights.tokens(D, [delta(second, 0, 7)], 0.2)
    assert flights.cancel(1, 0.3) == [Abandon(D, 1, 1)]


def test_cancels_in_either_leg() -> None:
    flights = make_flights(P, D)
    _, first = submit(flights)
    assert flights.cancel(first.rid, 0.1) == [Abandon(P, 1, 0)]
    assert nothing_is_left(flights)
    assert flights.prefilled(P, prefilled(first), 0.2) == [Abandon(P, 1, 0)]  # it crossed the cancel
    _, first = submit(flights, 1.0)
    only(flights.prefilled(P, prefilled(first), 1.2))
    # The decode worker may not have asked for the blocks yet.
    assert flights.cancel(first.rid, 1.3) == [Abandon(D, 2, 1), Abandon(P, 2, 0)]
    assert nothing_is_left(flights)


def test_an_answer_of_an_earlier_attempt_is_no_answer() -> None:
    flights = make_flights(P, D)
    _, first = submit(flights)
    assert flights.prefilled(P, Prefilled(1, 5, EPOCH, 3, 100), 0.1) == [Abandon(P, 1, 5)]
    assert flights.prefilled(Q, prefilled(first), 0.1) == [Abandon(Q, 1, 0)]
    assert flights.open_at(P) == 1
    assert flights.stale == 2


def test_an_answer_that_comes_twice_takes_nothing_back() -> None:
    flights = make_flights(P, D, E)
    _, first = submit(flights)
    second = decoding(flights, first)
    assert flights.prefilled(P, prefilled(first), 0.15) == []
    assert only(flights.worker_lost(second.worker, "gone", 0.2)).transfer == second.transfer


# The explanation.


def test_the_explanation_says_who_computes() -> None:
    flights = make_flights(P, D)
    told = flights.routes.explain(job(), 0.0)
    assert told is not None
    prefill = explanation(flights.routes.router, MODEL, told)["prefill"]
    assert (prefill["worker"], prefill["remote"], prefill["why"]) == (P, True, "remote")
    assert prefill["remote_s"] < prefill["local_s"]
    assert submit(flights)[1].hand_over
    flights.report(P, 0, Load(prefill_tps=10_000.0, prefill_tokens_queued=20_000), 0.0)
    told = flights.routes.explain(job(), 0.0)
    assert told is not None
    prefill = explanation(flights.routes.router, MODEL, told)["prefill"]
    assert (prefill["worker"], prefill["remote"], prefill["why"]) == (P, False, "prefill busy")
    assert not submit(flights)[1].hand_over
    flights = make_flights(D)
    told = flights.routes.explain(job(), 0.0)
    assert told is not None
    rows = explanation(flights.routes.router, MODEL, told)
    assert rows["prefill"] == {
        "worker": None, "remote": False, "local_s": 0.16 * 1.25, "remote_s": None, "why": "no prefill worker",
    }  # fmt: skip
    assert [row["role"] for row in rows["candidates"]] == ["decode"]


def test_an_aggregated_workers_explanation_names_no_other() -> None:
    flights = make_flights(P, A)
    told = flights.routes.explain(job(), 0.0)
    assert told is not None
    rows = explanation(flights.routes.router, MODEL, told)
    assert rows["prefill"] is rows["pull"] is None


class HandOverMachine(RuleBasedStateMachine):
    """Prefill workers that hold blocks until they are told or the decode worker has read them; decode workers that
    answer token ``position`` at each position; both die, refuse, forget and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.up = {P, D}
        self.flights = Flights(Routes(Router("kv", random.Random(0), KvIndex())), lambda data: ())
        self.sinks: dict[int, Recorder] = {}
        self.held: dict[NodeId, dict[tuple[int, int], Dispatch]] = {worker: {} for worker in ROLES}
        self.position: dict[tuple[int, int], int] = {}
        self.leases: dict[tuple[NodeId, int, int], int] = {}
        """(prefill worker, rid, attempt) -> lease"""
        self.lease = 0
        self.spent: set[int] = set()
        """Committed by a decode worker of whose tokens nothing came: nobody can know it, and the owner refuses them."""
        self.answers: list[tuple[NodeId, Prefilled]] = []
        self.take(self.flights.routable(serving(*self.up), 0.0))

    def take(self, actions: Sequence[Action]) -> None:
        for action in actions:
            key = (action.rid, action.attempt)
            if isinstance(action, Abandon):
                self.held[action.worker].pop(key, None)
                self.leases.pop((action.worker, *key), None)
                continue
            assert action.worker in self.up, "routed to a worker that is not up"
            assert action.hand_over == (ROLES[action.worker] == PREFILL)
            sent = list(action.tokens[len(action.job.tokens) :])
            sink = self.sinks.get(action.rid)
            assert sink is None or sent == sink.tokens
            if action.transfer is not None:
                assert action.transfer.source in self.up
                assert action.transfer.lease in {*self.leases.values(), *self.spent}
            self.held[action.worker][key] = action
            self.position[key] = len(sent)

    @rule(resumable=st.booleans(), length=st.sampled_from([16, 1600]))
    def submit(self, resumable: bool, length: int) -> None:
        sink = Recorder()
        rid, actions = self.flights.submit(job(PROMPT[:length], resumable), sink, self.now)
        self.sinks[rid] = sink
        self.take(actions)

    @rule(data=st.data(), worker=st.sampled_from([P, Q]), holds=st.booleans(), arrives=st.booleans())
    def compute(self, data: st.DataObject, worker: NodeId, holds: bool, arrives: bool) -> None:
        """A prefill worker answers, or its answer stays under way."""
        if not self.held[worker]:
            return
        key = data.draw(st.sampled_from(sorted(self.held[worker])))
        del self.held[worker][key]
        self.lease += 1
        if holds:
            self.leases[worker, *key] = self.lease
        message = Prefilled(*key, EPOCH, self.lease if holds else 0, 100 if holds else 0)
        self.answers.append((worker, message))
        if arrives:
            self.take(self.flights.prefilled(worker, message, self.now))

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def deliver_an_answer_again(self, data: st.DataObject) -> None:
        """... or for the first time, after whatever has happened."""
        worker, message = data.draw(st.sampled_from(self.answers))
        if worker in self.up:
            self.take(self.flights.prefilled(worker, message, self.now))

    @rule(data=st.data(), worker=st.sampled_from([D, E, A]), count=st.integers(1, 3), lost=st.booleans(),
          finish=st.sampled_from(["", "", "", "stop", "length", "error"]))  # fmt: skip
    def step(self, data: st.DataObject, worker: NodeId, count: int, lost: bool, finish: str) -> None:
        for key, dispatch in list(self.held[worker].items()):
            position = self.position[key]
            if dispatch.transfer is not None and position == len(dispatch.tokens) - len(dispatch.job.tokens):
                for lent in [lent for lent, lease in self.leases.items() if lease == dispatch.transfer.lease]:
                    committed = self.leases.pop(lent)
                    if lost:
                        self.spent.add(committed)
            self.position[key] = position + count
            if finish:
                del self.held[worker][key]
            if not lost:
                frame = Delta(*key, position, tuple(range(position, position + count)), finish, 0, b"")
                self.take(self.flights.tokens(worker, [frame], self.now))

    @rule(data=st.data(), worker=st.sampled_from(list(ROLES)), code=st.sampled_from(["overload", "engine", "invalid"]))
    def refuse(self, data: st.DataObject, worker: NodeId, code: str) -> None:
        if self.held[worker]:
            key = data.draw(st.sampled_from(sorted(self.held[worker])))
            del self.held[worker][key]
            self.take(self.flights.refused(worker, *key, code, "no", self.now))

    @rule(worker=st.sampled_from(list(ROLES)))
    def die(self, worker: NodeId) -> None:
        self.up.discard(worker)
        self.held[worker].clear()
        self.leases = {lent: lease for lent, lease in self.leases.items() if lent[0] != worker}
        self.answers = [(source, message) for source, message in self.answers if source != worker]
        self.take(self.flights.worker_lost(worker, "died", self.now))
        self.take(self.flights.routable(serving(*sorted(self.up)), self.now))

    @rule(worker=st.sampled_from(list(ROLES)), load=st.sampled_from([LOAD, Load(), Load(queued=1000)]))
    def come(self, worker: NodeId, load: Load) -> None:
        self.up.add(worker)
        self.take(self.flights.routable(serving(*sorted(self.up)), self.now))
        self.take(self.flights.report(worker, 0, load, self.now))

    @rule(worker=st.sampled_from(list(ROLES)))
    def heartbeat(self, worker: NodeId) -> None:
        if worker in self.up:
            self.take(self.flights.missing_at(worker, [rid for rid, _ in self.held[worker]], self.now, self.now))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.flights.open:
            rid = data.draw(st.sampled_from(sorted(self.flights.open)))
            self.sinks[rid].cancelled = True
            self.take(self.flights.cancel(rid, self.now))

    @rule(seconds=st.floats(0.1, 6.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.flights.tick(self.now))

    @invariant()
    def streams_are_in_order_without_repeats(self) -> None:
        for sink in self.sinks.values():
            assert sink.tokens == list(range(len(sink.tokens)))

    @invariant()
    def each_request_is_open_or_ended_once(self) -> None:
        for rid, sink in self.sinks.items():
            assert (rid in self.flights.open) == (not sink.ends and not sink.cancelled)

    @invariant()
    def no_blocks_are_held_for_nobody(self) -> None:
        """Of what has been told, each lease is for a request that may still read; what is under way will be refused."""
        coming = {(worker, message.rid, message.attempt) for worker, message in self.answers}
        for worker, rid, attempt in self.leases.keys() - coming:
            flight = self.flights.open[rid]
            assert flight.lent is not None
            assert (flight.lent.transfer.source, flight.lent.attempt) == (worker, attempt)

    @invariant()
    def books_balance(self) -> None:
        promised = [flight.decode.target for flight in self.flights.open.values() if flight.decode is not None]
        for target in self.flights.routes.targets():
            assert target.promised == promised.count(target)
            assert target.mine == self.flights.open_at(target.worker) + target.promised
        for flight in self.flights.open.values():
            assert flight.worker is None or flight.worker in self.up
            assert flight.attempt <= 2 * MIGRATION_LIMIT + 2
        if not self.flights.open:
            assert nothing_is_left(self.flights)
            assert not self.flights._at
            assert not self.flights._waiting


HandOverMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHandOverMachine = HandOverMachine.TestCase
