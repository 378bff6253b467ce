"""The frontend's open requests: exactly-once delivery in order, whatever workers and frames do."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pdyn.core import admission
from p2pdyn.core.admission import MAX_QUEUED, SUPPLY
from p2pdyn.core.flight import MAX_WAITING, MIGRATION_LIMIT, WAIT_S, Flights
from p2pdyn.core.flight_parts import Abandon, Dispatch
from p2pdyn.core.request import Failure, Job, Logprobs, Outcome, Rejected
from p2pdyn.core.router import Router
from p2pdyn.core.routes import Endpoint, Routes, Serving
from p2pdyn.core.types import Load, NodeId, SamplingParams
from p2pdyn.wire.requests import Delta

MODEL = "m"
A, B, C = NodeId("a" * 16), NodeId("b" * 16), NodeId("c" * 16)


class Recorder:
    """A sink that checks the promises made to sinks."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.cached: list[int] = []
        self.routed: list[NodeId] = []
        self.ends: list[Outcome] = []
        self.cancelled = False

    def on_routed(self, worker: NodeId) -> None:
        assert not self.ends
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


def make_flights(*workers: NodeId, policy: str = "round-robin") -> Flights:
    flights = Flights(Routes(Router(policy, random.Random(1))), lambda data: ())
    flights.routable(serving(*workers), 0.0)
    return flights


def serving(*workers: NodeId) -> dict[str, Serving]:
    return {MODEL: Serving(16, tuple(Endpoint(worker, 0, True) for worker in workers))}


def job(resumable: bool = True, pin: str = "", client: str = "") -> Job:
    return Job(MODEL, array("I", [1, 2, 3]), SamplingParams(), resumable=resumable, pin=pin, client=client)


def submit(flights: Flights, resumable: bool = True) -> tuple[Recorder, Dispatch]:
    sink = Recorder()
    _, (dispatch,) = flights.submit(job(resumable), sink, 0.0)
    assert isinstance(dispatch, Dispatch)
    return sink, dispatch


def delta(dispatch: Dispatch, offset: int, *tokens: int, finish: str = "", cached: int = 0) -> Delta:
    return Delta(dispatch.rid, dispatch.attempt, offset, tokens, finish, cached, b"")


def test_tokens_reach_the_sink_and_finish_ends_it() -> None:
    flights = make_flights(A)
    sink, dispatch = submit(flights)
    assert flights.tokens(A, [delta(dispatch, 0, 7, 8, cached=2)], 0.1) == []
    assert flights.tokens(A, [delta(dispatch, 2, 9, finish="stop")], 0.2) == []
    assert sink.tokens == [7, 8, 9]
    assert sink.cached == [2, 0]
    assert sink.ends == [Outcome("stop", (A,))]
    assert not flights.open


def test_lost_worker_moves_the_stream_with_what_was_received() -> None:
    flights = make_flights(A, B)
    sink, first = submit(flights)
    other = B if first.worker == A else A
    flights.tokens(first.worker, [delta(first, 0, 7)], 0.1)
    (second,) = flights.worker_lost(first.worker, "gone", 0.2)
    assert second == Dispatch(other, first.rid, 1, first.job, array("I", [1, 2, 3, 7]), uncached=4)
    assert isinstance(second, Dispatch)
    flights.tokens(other, [delta(second, 1, 8, finish="length")], 0.3)
    assert sink.tokens == [7, 8]
    assert sink.ends == [Outcome("length", (first.worker, other), migrations=1)]


def test_hole_in_the_offsets_counts_as_loss() -> None:
    flights = make_flights(A, B)
    sink, first = submit(flights)
    abandon, again = flights.tokens(first.worker, [delta(first, 1, 8)], 0.1)
    assert abandon == Abandon(first.worker, first.rid, 0)
    assert isinstance(again, Dispatch)
    assert again.worker != first.worker
    assert sink.tokens == []


def test_older_attempts_are_dropped_and_told_to_stop() -> None:
    flights = make_flights(A, B)
    sink, first = submit(flights)
    flights.worker_lost(first.worker, "gone", 0.1)
    flights.routable(serving(A, B), 0.2)
    assert flights.tokens(first.worker, [delta(first, 0, 9)], 0.2) == [Abandon(first.worker, first.rid, 0)]
    assert sink.tokens == []


def test_unresumable_request_is_rerun_before_the_first_token_only() -> None:
    flights = make_flights(A, B, C)
    sink, first = submit(flights, resumable=False)
    (second,) = flights.worker_lost(first.worker, "gone", 0.1)
    assert isinstance(second, Dispatch)
    flights.tokens(second.worker, [delta(second, 0, 7)], 0.2)
    assert flights.worker_lost(second.worker, "gone", 0.3) == []
    assert sink.ends[0].failure is not None
    assert (sink.ends[0].failure.status, sink.ends[0].failure.code) == (503, "worker_lost")


def test_a_request_that_is_lost_everywhere_ends() -> None:
    flights = make_flights(A, B)
    sink, dispatch = submit(flights)
    for _ in range(MIGRATION_LIMIT):
        (again,) = flights.worker_lost(dispatch.worker, "died", 0.1)
        assert isinstance(again, Dispatch)
        dispatch = again
        flights.routable(serving(A, B), 0.1)
    assert flights.worker_lost(dispatch.worker, "died", 0.2) == []
    assert sink.ends[0].finish == "error"
    assert sink.ends[0].migrations == MIGRATION_LIMIT


def test_waits_for_a_worker_and_gives_up() -> None:
    flights = make_flights()
    sink = Recorder()
    rid, actions = flights.submit(job(), sink, 1.0)
    assert actions == []
    assert flights.next_deadline() == 1.0 + WAIT_S
    assert flights.tick(1.0 + WAIT_S) == []
    assert sink.ends[0].failure is not None
    assert sink.ends[0].failure.code == "no_ready_worker"
    assert rid not in flights.open
    assert flights.next_deadline() is None


def test_waiting_requests_start_when_a_worker_comes() -> None:
    flights = make_flights()
    sink = Recorder()
    rid, _ = flights.submit(job(), sink, 0.0)
    (dispatch,) = flights.routable(serving(A), 0.5)
    assert isinstance(dispatch, Dispatch)
    assert (dispatch.rid, dispatch.worker) == (rid, A)
    assert sink.routed == [A]


def test_too_many_waiting_are_rejected() -> None:
    flights = make_flights()
    for _ in range(MAX_WAITING):
        flights.submit(job(), Recorder(), 0.0)
    with pytest.raises(Rejected) as rejected:
        flights.submit(job(), Recorder(), 0.0)
    assert (rejected.value.failure.status, rejected.value.failure.retry_after) == (429, WAIT_S)


def test_pin_is_obeyed() -> None:
    flights = make_flights(A, B, C)
    for _ in range(6):
        _, (dispatch,) = flights.submit(job(pin=B), Recorder(), 0.0)
        assert dispatch.worker == B


def test_invalid_is_the_clients_fault_and_not_retried() -> None:
    flights = make_flights(A, B)
    sink, dispatch = submit(flights)
    assert flights.refused(dispatch.worker, dispatch.rid, 0, "invalid", "too long", 0.1) == []
    assert sink.ends[0].failure == Failure(400, "invalid_request", "too long")


def test_request_that_the_worker_forgot_is_moved() -> None:
    flights = make_flights(A, B)
    _, dispatch = submit(flights)
    assert flights.missing_at(dispatch.worker, [dispatch.rid], 5.0, 5.0) == []
    assert flights.missing_at(dispatch.worker, [], -1.0, 0.5) == []  # sent too recently to have been seen
    abandon, again = flights.missing_at(dispatch.worker, [], 5.0, 5.0)
    assert isinstance(abandon, Abandon)
    assert isinstance(again, Dispatch)


def test_requests_wait_while_all_workers_are_saturated_and_go_by_priority() -> None:
    flights = make_flights(A)
    assert flights.report(A, 0, Load(queued=1000), 0.0) == []
    sinks = []
    for priority in (5, 0):
        waiting = Job(MODEL, array("I", [1, 2, 3]), SamplingParams(priority=priority))
        sinks.append(Recorder())
        assert flights.submit(waiting, sinks[-1], 0.0)[1] == []
    assert not any(sink.routed for sink in sinks)
    first, second = flights.report(A, 0, Load(), 0.1)
    assert (first.rid, second.rid) == (2, 1)
    assert all(sink.routed == [A] for sink in sinks)


def test_a_full_queue_is_429_and_a_long_wait_too() -> None:
    flights = make_flights(A)
    flights.report(A, 0, Load(queued=1000), 0.0)
    waiting = [Recorder() for _ in range(MAX_QUEUED)]
    for number, sink in enumerate(waiting):
        flights.submit(job(client=str(number)), sink, 0.0)
    with pytest.raises(Rejected) as refused:
        flights.submit(job(client="late"), Recorder(), 0.0)
    assert refused.value.failure.status == 429
    assert refused.value.failure.retry_after
    assert flights.tick(admission.WAIT_S - 1) == []
    flights.tick(admission.WAIT_S)
    assert {sink.ends[0].failure.status for sink in waiting if sink.ends[0].failure} == {429}
    assert not flights.open


def test_a_flood_waits_here_and_another_client_goes_next() -> None:
    """The worker says nothing of its load: what was sent and has not begun is known without it."""
    flights = make_flights(A)
    sent = [action for _ in range(500) for action in flights.submit(job(client="flood"), Recorder(), 0.0)[1]]
    assert len(sent) == SUPPLY
    modest = Recorder()
    flights.submit(job(client="modest"), modest, 0.1)
    begun = [delta(dispatch, 0, 7) for dispatch in sent[:2] if isinstance(dispatch, Dispatch)]
    assert len(flights.tokens(A, begun, 0.2)) == 2
    assert modest.routed == [A]
    # Whoever ends before it has begun makes room too.
    assert isinstance(flights.cancel(sent[2].rid, 0.3)[-1], Dispatch)


def test_a_worker_whose_batch_is_full_gets_what_soon_becomes_free() -> None:
    flights = make_flights(A)
    first = submit(flights)[1]
    flights.report(A, 0, Load(active_requests=64, queued=3), 1.0)
    sent = [action for _ in range(100) for action in flights.submit(job(), Recorder(), 1.0)[1]]
    assert len(sent) == 64 // 4 - 1
    # The one that was overdue has begun: nothing holds them up any more.
    assert len(flights.tokens(A, [delta(first, 0, 7)], 1.1)) == SUPPLY - len(sent)


def test_long_prompts_are_a_supply_by_their_tokens() -> None:
    flights = make_flights(A)
    flights.report(A, 0, Load(prefill_tps=1000.0), 0.0)
    long = Job(MODEL, array("I", range(400)), SamplingParams())
    assert len([action for _ in range(9) for action in flights.submit(long, Recorder(), 0.0)[1]]) == 2


def test_a_queued_request_can_be_cancelled_and_outlives_its_workers() -> None:
    flights = make_flights(A)
    flights.report(A, 0, Load(queued=1000), 0.0)
    sinks = [Recorder(), Recorder()]
    rids = [flights.submit(job(), sink, 0.0)[0] for sink in sinks]
    sinks[0].cancelled = True
    assert flights.cancel(rids[0], 0.1) == []
    assert flights.worker_lost(A, "gone", 0.2) == []
    (dispatch,) = flights.routable(serving(B), 0.3)
    assert (dispatch.rid, dispatch.worker) == (rids[1], B)


def test_a_pin_does_not_wait_for_room() -> None:
    flights = make_flights(A, B)
    flights.report(A, 0, Load(queued=1000), 0.0)
    flights.report(B, 0, Load(queued=1000), 0.0)
    (dispatch,) = flights.submit(job(pin=B), Recorder(), 0.0)[1]
    assert dispatch.worker == B


class FlightMachine(RuleBasedStateMachine):
    """Workers that answer token ``position`` at each position, lose frames, forget, die and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.up = {A, B}
        self.draining: set[NodeId] = set()
        self.flights = Flights(Routes(Router("least-loaded", random.Random(0))), lambda data: ())
        self.sinks: dict[int, Recorder] = {}
        self.held: dict[NodeId, dict[tuple[int, int], int]] = {A: {}, B: {}, C: {}}
        self.old_frames: list[tuple[NodeId, Delta]] = []
        self.take(self.flights.routable(serving(A, B), 0.0))

    def take(self, actions: Sequence[Dispatch | Abandon]) -> None:
        for action in actions:
            if isinstance(action, Dispatch):
                assert action.worker in self.up, "routed to a worker that is not up"
                sink = self.sinks.get(action.rid)
                sent = list(action.tokens[3:])
                assert sent == list(range(len(sent)))
                assert sink is None or sent == sink.tokens
                self.held[action.worker][action.rid, action.attempt] = len(sent)
            else:
                self.held[action.worker].pop((action.rid, action.attempt), None)

    @rule(resumable=st.booleans())
    def submit(self, resumable: bool) -> None:
        sink = Recorder()
        rid, actions = self.flights.submit(job(resumable), sink, self.now)
        self.sinks[rid] = sink
        self.take(actions)

    @rule(worker=st.sampled_from([A, B, C]), queued=st.sampled_from([0, 1000]))
    def report(self, worker: NodeId, queued: int) -> None:
        """A worker that is saturated, or no longer."""
        self.take(self.flights.report(worker, 0, Load(queued=queued), self.now))

    @rule(data=st.data(), count=st.integers(1, 3), finish=st.sampled_from(["", "", "", "stop", "length", "error"]))
    def step(self, data: st.DataObject, count: int, finish: str) -> None:
        worker = data.draw(st.sampled_from([A, B, C]))
        for (rid, attempt), position in list(self.held[worker].items()):
            frame = Delta(rid, attempt, position, tuple(range(position, position + count)), finish, 0, b"")
            if finish:
                del self.held[worker][rid, attempt]
            else:
                self.held[worker][rid, attempt] = position + count
            self.old_frames.append((worker, frame))
            if data.draw(st.booleans()):
                self.take(self.flights.tokens(worker, [frame], self.now))

    @precondition(lambda self: self.old_frames)
    @rule(data=st.data())
    def deliver_an_old_frame_again(self, data: st.DataObject) -> None:
        worker, frame = data.draw(st.sampled_from(self.old_frames))
        self.take(self.flights.tokens(worker, [frame], self.now))

    @rule(worker=st.sampled_from([A, B, C]), died=st.booleans())
    def die(self, worker: NodeId, died: bool) -> None:
        self.up.discard(worker)
        self.draining.discard(worker)
        self.held[worker].clear()
        self.take(self.flights.worker_lost(worker, "died", self.now, died))
        self.take(self.flights.routable(serving(*sorted(self.up)), self.now))

    @rule(worker=st.sampled_from([A, B, C]), over=st.booleans())
    def drain(self, worker: NodeId, over: bool) -> None:
        """Routed to no more, it asks for what it has to go on elsewhere; ``over``: there is no time for the rest."""
        if worker in self.up:
            self.up.discard(worker)
            self.draining.add(worker)
            self.take(self.flights.routable(serving(*sorted(self.up)), self.now))
        if worker in self.draining:
            self.take(self.flights.move(worker, list(self.held[worker]), self.now))
            for rid, attempt in list(self.held[worker]) if over else []:
                self.take(self.flights.refused(worker, rid, attempt, "draining", "it drains", self.now))

    @rule(worker=st.sampled_from([A, B, C]))
    def come(self, worker: NodeId) -> None:
        if worker in self.draining:
            self.die(worker, False)
        self.up.add(worker)
        self.take(self.flights.routable(serving(*sorted(self.up)), self.now))

    @rule(worker=st.sampled_from([A, B, C]))
    def live(self, worker: NodeId) -> None:
        """It was cut off only."""
        if worker in self.draining:
            return
        self.up.add(worker)
        self.take(self.flights.worker_lives(worker, self.now))
        self.take(self.flights.routable(serving(*sorted(self.up)), self.now))

    @rule(worker=st.sampled_from([A, B, C]))
    def heartbeat(self, worker: NodeId) -> None:
        if worker in self.up | self.draining:
            known = [rid for rid, _ in self.held[worker]]
            self.take(self.flights.missing_at(worker, known, self.now, self.now))

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
    def books_balance(self) -> None:
        for target in self.flights.routes.targets():
            assert target.mine == self.flights.open_at(target.worker)
        idle = {flight.rid for flight in self.flights.open.values() if flight.worker is None}
        assert not self.flights._waiting.keys() & self.flights.trials.held.keys()
        waiting = set(self.flights._waiting) | set(self.flights.trials.held)
        assert waiting <= idle
        trials = self.flights.trials.blame.trials
        assert not self.flights.trials.held or self.flights.trials.room or trials or self.flights.trials._accused
        assert self.flights.trials._accused.keys() <= self.flights.trials.held.keys()
        for worker, rid in self.flights.trials.blame._trials.items():
            assert self.flights.open[rid].worker == worker
        assert len(idle - waiting) == self.flights.routes.queued().get(MODEL, 0)
        assert (idle == waiting) == (not self.flights.routes.crowded)
        for flight in self.flights.open.values():
            assert flight.worker is None or flight.worker in self.up | self.draining
        if not self.flights.open:
            assert not self.flights._at


FlightMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFlightMachine = FlightMachine.TestCase
