"""A routed prompt counts as held by its target: siblings follow it, and it is forgotten in time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pdyn.core.kvhash import chain
from p2pdyn.core.router_predict import APPROXIMATE_TTL_S, PENDING_S, TTL_S, Predictions
from p2pdyn.core.router_target import Target
from p2pdyn.core.types import NodeId

A, B = (Target(NodeId(letter * 16)) for letter in "ab")
GUESSED = Target(NodeId("c" * 16), approximate=True)
PROMPT = chain(None, list(range(20)))


def prompt(*blocks: int) -> list[int]:
    return chain(None, list(blocks))


def test_siblings_find_what_they_share() -> None:
    known = Predictions()
    known.add(1, A, PROMPT, 0, 0.0)
    assert known.match(PROMPT, 0.0) == {A: 20}
    assert known.match(PROMPT[:7], 0.0) == {A: 7}
    assert known.match(prompt(0, 1, 2, 99), 0.0) == {A: 3}
    assert known.match(prompt(99, 1, 2), 0.0) == {}
    assert known.match([], 0.0) == {}


def test_only_the_tail_is_kept_and_it_stands_for_the_whole_prefix() -> None:
    known = Predictions()
    known.add(1, A, PROMPT, 15, 0.0)
    assert known.blocks == 5
    assert known.match(PROMPT, 0.0) == {A: 20}
    assert known.match(PROMPT[:15], 0.0) == {}


def test_a_prediction_outlives_the_first_token_by_its_ttl() -> None:
    known = Predictions()
    known.add(1, A, PROMPT, 0, 0.0)
    known.settled(1, 5.0)
    assert known.match(PROMPT, 5.0 + TTL_S - 0.01) == {A: 20}
    assert known.match(PROMPT, 5.0 + TTL_S) == {}
    assert (len(known), known.blocks) == (0, 0)


def test_it_waits_for_a_first_token_but_not_for_ever() -> None:
    known = Predictions()
    known.add(1, A, PROMPT, 0, 0.0)
    assert known.match(PROMPT, PENDING_S - 1) == {A: 20}
    assert known.match(PROMPT, PENDING_S) == {}


def test_a_refused_request_or_a_lost_target_takes_its_prediction_along() -> None:
    known = Predictions()
    known.add(1, A, PROMPT, 0, 0.0)
    known.add(2, B, PROMPT, 0, 0.0)
    known.failed(1)
    assert known.match(PROMPT, 0.0) == {B: 20}
    known.forget(B)
    assert known.match(PROMPT, 0.0) == {}


def test_without_events_it_lives_long_and_use_keeps_it() -> None:
    known = Predictions()
    known.add(1, GUESSED, PROMPT[:10], 0, 0.0)
    known.settled(1, 1.0)
    known.add(2, GUESSED, PROMPT, 10, 100.0)
    known.add(3, GUESSED, PROMPT, 20, 200.0)
    assert known.match(PROMPT[:5], 200.0 + APPROXIMATE_TTL_S - 1) == {GUESSED: 5}
    assert known.match(PROMPT, 200.0 + APPROXIMATE_TTL_S - 1) == {GUESSED: 20}
    assert known.match(PROMPT, 200.0 + APPROXIMATE_TTL_S) == {}


def test_what_has_ended_is_not_remembered_until_it_was_due() -> None:
    known = Predictions()
    for number in range(20_000):
        now = number / 1000
        known.add(number, A, prompt(number), 0, now)
        known.settled(number, now)
        known.match(prompt(number, 1), now)
        if number % 3:
            known.failed(number)
    assert len(known) < 1000
    assert len(known._due) <= 4 * len(known) + 256
    known.expire(20.0 + PENDING_S)
    assert not len(known)


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    known = Predictions(limit=100)
    for number in range(50):
        known.add(number, A, prompt(*range(number * 100, number * 100 + 10)), 0, 0.0)
    assert known.blocks == 100
    assert known.match(prompt(*range(10)), 0.0) == {}
    assert known.match(prompt(*range(4900, 4910)), 0.0) == {A: 10}


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=8), st.booleans()), max_size=12), st.data())
def test_it_finds_what_a_set_of_prefixes_would(sent: list[tuple[list[int], bool]], data: st.DataObject) -> None:
    known = Predictions()
    truth: dict[Target, set[int]] = {A: set(), B: set()}
    for key, (blocks, first) in enumerate(sent):
        target, hashes = (A if first else B), prompt(*blocks)
        known.add(key, target, hashes, known.match(hashes, 0.0).get(target, 0), 0.0)
        truth[target].update(hashes)
    asked = prompt(*data.draw(st.lists(st.integers(0, 2), max_size=8)))
    expected = {target: sum(one in held for one in asked) for target, held in truth.items()}
    assert known.match(asked, 0.0) == {target: count for target, count in expected.items() if count}
