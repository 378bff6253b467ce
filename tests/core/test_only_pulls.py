"""Decode workers whose engine computes no prompts: whatever they get is handed over, while it is computed, and once."""

from __future__ import annotations

from array import array

from core.test_hand_over import (  # workers, by role
    EPOCH,
    LOAD,
    A,
    D,
    E,
    P,
    Q,
    Recorder,
    delta,
    job,
    make_flights,
    nothing_is_left,
    only,
    prefilled,
    serving,
    submit,
)

from p2pdyn.core.catalog import Catalog
from p2pdyn.core.flight import WAIT_S, Flights
from p2pdyn.core.flight_parts import Abandon, Action, Dispatch, Transfer
from p2pdyn.core.types import DECODE, READY, NodeId, PeerInfo, ServedModel

OWN = "sglang-nixl!"


def flights_of(*workers: NodeId) -> Flights:
    return make_flights(*workers, moves_kv=OWN)


def handed(flights: Flights, first: Dispatch, cached: int = 0) -> list[Action]:
    return flights.prefilled(first.worker, prefilled(first, 0, 0, cached, remote=b"room"), 0.1)


def test_the_shortest_prompt_is_handed_over() -> None:
    flights = flights_of(P, D)
    sink = Recorder()
    _, actions = flights.submit(job(array("I", [1, 2, 3])), sink, 0.0)
    first = only(actions)
    assert (first.worker, first.hand_over) == (P, True)
    second = only(handed(flights, first))
    assert (second.worker, second.transfer) == (D, Transfer(P, EPOCH, 0, 0, b"room"))
    flights.tokens(D, [delta(second, 0, 7, cached=2)], 0.2)
    flights.tokens(D, [delta(second, 1, 8, finish="stop")], 0.3)
    assert (sink.tokens, sink.cached) == ([7, 8], [2, 0]), "the decode side tells what was cached"
    assert nothing_is_left(flights)


def test_without_a_prefill_worker_nobody_is_routed_to() -> None:
    flights = flights_of(D)
    sink = Recorder()
    rid, actions = flights.submit(job(), sink, 0.0)
    assert actions == []
    first = flights.routable(serving(P, D, moves_kv=OWN), 1.0)
    assert only(first).worker == P
    flights.cancel(rid, 1.1)
    _, actions = flights_of(D, A).submit(job(), Recorder(), 0.0)
    assert only(actions).worker == A, "who computes for itself needs none"


def test_those_that_wait_in_vain_are_told() -> None:
    flights = flights_of(D)
    sink = Recorder()
    flights.submit(job(), sink, 0.0)
    flights.tick(WAIT_S + 0.1)
    assert sink.ends[0].failure is not None
    assert sink.ends[0].failure.status == 503
    assert nothing_is_left(flights)


def test_what_fails_at_the_decode_side_is_computed_again() -> None:
    """By the only prefill worker there is, too; and what the failed room holds is let go."""
    flights = flights_of(P, D)
    sink, first = submit(flights)
    second = only(handed(flights, first))
    actions = flights.tokens(D, [delta(second, 0, finish="error")], 0.2)
    assert actions[0] == Abandon(P, first.rid, first.attempt)
    third = only(actions[1:])
    assert (third.worker, third.hand_over, third.attempt) == (P, True, 2)
    fourth = only(handed(flights, third))
    flights.tokens(D, [delta(fourth, 0, 7, finish="stop")], 0.3)
    assert sink.tokens == [7]
    assert nothing_is_left(flights)


def test_a_prefill_worker_that_is_lost_takes_its_rooms_along() -> None:
    flights = flights_of(P, Q, D)
    sink, first = submit(flights)
    second = only(handed(flights, first))
    other = Q if first.worker == P else P
    actions = flights.worker_lost(first.worker, "gone", 0.2)
    assert Abandon(D, second.rid, second.attempt) in actions
    (again,) = [action for action in actions if isinstance(action, Dispatch)]
    assert (again.worker, again.hand_over) == (other, True)
    last = only(handed(flights, again))
    flights.tokens(D, [delta(last, 0, 7)], 0.3)
    assert flights.worker_lost(other, "gone", 0.4) == [], "its first token has come: the prompt is there"
    flights.tokens(D, [delta(last, 1, 8, finish="stop")], 0.5)
    assert sink.tokens == [7, 8]
    assert nothing_is_left(flights)


def test_a_stream_goes_on_elsewhere_with_all_it_has_computed_again() -> None:
    flights = flights_of(P, D, E)
    sink, first = submit(flights)
    second = only(handed(flights, first))
    flights.tokens(second.worker, [delta(second, 0, 7, 8)], 0.2)
    third = only(flights.worker_lost(second.worker, "gone", 0.3))
    assert (third.worker, third.hand_over, list(third.tokens[-2:])) == (P, True, [7, 8])
    fourth = only(handed(flights, third))
    assert fourth.worker == (E if second.worker == D else D)
    flights.tokens(fourth.worker, [delta(fourth, 2, 9, finish="stop")], 0.4)
    assert sink.tokens == [7, 8, 9]
    assert nothing_is_left(flights)


def test_another_kind_of_prefill_worker_is_of_no_use() -> None:
    flights = flights_of(D)
    others = serving(P, moves_kv="sglang-nixl-other!")["m"].targets
    mixed = serving(D, moves_kv=OWN)["m"]
    flights.routable({"m": type(mixed)(mixed.block_size, mixed.targets + others)}, 0.0)
    flights.report(P, 0, LOAD, 0.0)
    _, actions = flights.submit(job(), Recorder(), 0.0)
    assert actions == []


def test_decode_workers_alone_are_a_concern() -> None:
    catalog = Catalog(600.0)
    served = ServedModel("m", "c", "f", 16, 100, moves_kv=OWN)
    catalog.refresh([(D, PeerInfo("d", "1", DECODE, state=READY, models=(served,), requests_port=1))], 0.0)
    assert "--role prefill" in catalog.models["m"].concern()
    assert "computes no prompts" in catalog.models["m"].concern()
