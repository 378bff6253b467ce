"""What a frontend does with the streams of workers that drain."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from p2pdyn.core.flight import MIGRATION_LIMIT, MOVE_LIMIT, Flights
from p2pdyn.core.flight_parts import Abandon, Dispatch
from p2pdyn.core.request import Failure, Job, Logprobs, Outcome
from p2pdyn.core.router import Router
from p2pdyn.core.routes import Endpoint, Routes, Serving
from p2pdyn.core.types import NodeId, SamplingParams
from p2pdyn.wire.requests import Delta

MODEL = "m"
A, B = NodeId("a" * 16), NodeId("b" * 16)


class Heard:
    """A sink."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends: list[Outcome] = []

    def on_routed(self, worker: NodeId) -> None:
        assert not self.ends

    def on_tokens(self, tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None:
        self.tokens += tokens

    def on_end(self, outcome: Outcome) -> None:
        assert not self.ends
        self.ends.append(outcome)


def serving(*workers: NodeId) -> dict[str, Serving]:
    return {MODEL: Serving(16, tuple(Endpoint(worker, 0, True) for worker in workers))}


def running(resumable: bool = True, pin: str = "", tokens: Sequence[int] = (7,)) -> tuple[Flights, Heard, Dispatch]:
    """A request on A, which then drains, so that B alone is routed to."""
    flights = Flights(Routes(Router("round-robin", random.Random(1))), lambda data: ())
    flights.routable(serving(A), 0.0)
    sink = Heard()
    _, (dispatch,) = flights.submit(Job(MODEL, array("I", [1, 2]), SamplingParams(), resumable, pin), sink, 0.0)
    assert isinstance(dispatch, Dispatch)
    if tokens:
        flights.tokens(A, [Delta(dispatch.rid, 0, 0, tuple(tokens))], 0.1)
    flights.routable(serving(B), 0.2)
    return flights, sink, dispatch


def asked(dispatch: Dispatch) -> list[tuple[int, int]]:
    return [(dispatch.rid, dispatch.attempt)]


def test_a_stream_moves_with_what_was_received() -> None:
    flights, sink, first = running()
    abandon, second = flights.move(A, asked(first), 0.3)
    assert abandon == Abandon(A, first.rid, 0)
    assert isinstance(second, Dispatch)
    assert (second.worker, second.attempt, list(second.tokens)) == (B, 1, [1, 2, 7])
    assert flights.move(A, asked(first), 0.4) == [Abandon(A, first.rid, 0)]
    flights.tokens(B, [Delta(second.rid, 1, 1, (8,), "stop")], 0.5)
    assert sink.tokens == [7, 8]
    assert sink.ends == [Outcome("stop", (A, B), migrations=1)]


def test_what_nobody_else_can_continue_stays() -> None:
    for more in ({"resumable": False}, {"pin": A}):
        flights, sink, first = running(**more)  # type: ignore[arg-type]
        assert flights.move(A, asked(first), 0.3) == []
        flights.tokens(A, [Delta(first.rid, 0, 1, (8,), "stop")], 0.4)
        assert sink.ends == [Outcome("stop", (A,))]


def test_it_stays_while_nobody_else_is_there() -> None:
    flights, sink, first = running()
    flights.routable({}, 0.3)
    assert flights.move(A, asked(first), 0.3) == []
    flights.routable(serving(B), 0.4)
    assert len(flights.move(A, asked(first), 0.5)) == 2
    assert not sink.ends


def test_what_the_client_has_not_seen_moves_though_it_cannot_be_resumed() -> None:
    flights, _, first = running(resumable=False, tokens=())
    _, second = flights.move(A, asked(first), 0.3)
    assert isinstance(second, Dispatch)


def test_a_refusal_for_draining_is_no_failure_either() -> None:
    flights, sink, first = running(tokens=())
    actions = flights.refused(A, first.rid, 0, "draining", "the worker is draining", 0.3)
    assert [action.worker for action in actions if isinstance(action, Dispatch)] == [B]
    assert not sink.ends
    assert flights.open[first.rid].failures == 0


def test_at_the_limit_what_cannot_be_resumed_ends() -> None:
    flights, sink, first = running(resumable=False)
    flights.refused(A, first.rid, 0, "draining", "the worker drained", 0.3)
    failure = sink.ends[0].failure
    assert failure is not None
    assert (failure.status, failure.code) == (503, "worker_lost")


def test_moves_leave_the_failures_alone_and_are_bounded() -> None:
    flights, sink, dispatch = running()
    here, there = A, B
    for number in range(MOVE_LIMIT + MIGRATION_LIMIT):
        assert flights.open[dispatch.rid].failures == max(0, number - MOVE_LIMIT)
        flights.routable(serving(there), 1.0)
        _, again = flights.move(here, asked(dispatch), 1.0)
        assert isinstance(again, Dispatch)
        dispatch, here, there = again, there, here
    flights.routable(serving(there), 2.0)
    flights.move(here, asked(dispatch), 2.0)
    assert sink.ends[0].failure is not None
    assert sink.ends[0].migrations == MOVE_LIMIT + MIGRATION_LIMIT


def test_a_frontend_that_has_to_go_ends_all_that_is_open() -> None:
    flights, sink, first = running()
    ended = Failure(503, "draining", "gone", 1)
    assert flights.end(ended, 0.3) == [Abandon(A, first.rid, 0)]
    assert sink.ends == [Outcome("error", (A,), 0, ended)]
    assert not flights.open
