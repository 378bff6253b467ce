"""Who waits when all targets are saturated, in what order, and what those hear who may not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdyn.core.admission import MAX_RETRY_S, Admission, Limits, saturation
from p2pdyn.core.request import Rejected
from p2pdyn.core.router_target import Target
from p2pdyn.core.types import Load, NodeId


@pytest.mark.parametrize(
    ("load", "queue_s", "words"),
    [
        (Load(), 0.0, ""),
        (Load(), 31.0, "31.0 s of prefill"),
        (Load(queued=127), 0.0, ""),
        (Load(queued=128), 0.0, "128 requests wait"),
        (Load(queued=8, kv_used=95, kv_total=100), 0.0, "95 of 100 KV blocks"),
        (Load(queued=7, kv_used=100, kv_total=100), 0.0, ""),
        (Load(queued=100, kv_used=94, kv_total=100), 0.0, ""),
    ],
)
def test_what_saturates_a_target(load: Load, queue_s: float, words: str) -> None:
    target = Target(NodeId("a" * 16))
    target.report(load, 0.0)
    why = saturation(target, queue_s, Limits())
    assert words in why
    assert bool(words) == bool(why)


def drain(queue: Admission) -> list[object]:
    return list(iter(lambda: queue.next(0.0), None))


def test_priority_first_and_the_lower_value_is_earlier_as_in_vllm() -> None:
    queue = Admission()
    for key, priority in [("a", 0), ("b", -1), ("c", 5), ("d", -1)]:
        queue.wait(key, 0.0, priority)
    assert drain(queue) == ["b", "d", "a", "c"]


def test_a_client_with_many_requests_does_not_keep_the_others_waiting() -> None:
    queue = Admission()
    for number in range(4):
        queue.wait(f"greedy{number}", 0.0, client="greedy")
    queue.wait("modest0", 0.0, client="modest")
    queue.wait("modest1", 0.0, client="modest")
    assert drain(queue) == ["greedy0", "modest0", "greedy1", "modest1", "greedy2", "greedy3"]


def test_a_client_that_was_away_gets_no_more_than_its_turn() -> None:
    queue = Admission()
    for number in range(3):
        queue.wait(f"a{number}", 0.0, client="a")
    assert queue.next(0.0) == "a0"
    assert queue.next(0.0) == "a1"
    for number in range(3):
        queue.wait(f"b{number}", 0.0, client="b")
    queue.wait("a3", 0.0, client="a")
    assert drain(queue) == ["b0", "a2", "b1", "b2", "a3"]


def test_a_full_queue_is_429_with_the_time_that_the_queue_will_take() -> None:
    queue = Admission(limit=10)
    for key in range(10):
        queue.wait(key, 0.0)
    for step in range(4):
        queue.next(step * 2.0)
        queue.wait(10 + step, step * 2.0)
    with pytest.raises(Rejected) as refused:
        queue.wait("late", 8.0)
    assert (refused.value.failure.status, refused.value.failure.retry_after) == (429, 20)
    with pytest.raises(Rejected) as refused:
        queue.wait("late", 8.0, clear_s=33.5)
    assert refused.value.failure.retry_after == 34
    assert queue.retry_after(1e9) == MAX_RETRY_S
    assert len(queue) == 10


def test_who_waited_too_long_is_told() -> None:
    queue = Admission(wait_s=30)
    queue.wait("a", 0.0)
    queue.wait("b", 10.0)
    assert queue.next_deadline() == 30.0
    assert queue.overdue(29.9) == []
    [(key, failure)] = queue.overdue(30.0)
    assert (key, failure.status, failure.retry_after) == ("a", 429, 1)
    assert queue.next_deadline() == 40.0
    assert queue.next(31.0) == "b"
    assert queue.next_deadline() is None


@given(st.lists(st.tuples(st.sampled_from("wnco"), st.integers(0, 9), st.integers(-1, 1), st.sampled_from("xy"))))
def test_everybody_leaves_once(steps: list[tuple[str, int, int, str]]) -> None:
    queue, waiting, now = Admission(limit=8, wait_s=5), set[object](), 0.0
    for kind, key, priority, client in steps:
        now += 1.0
        if kind == "w" and key not in waiting:
            if len(waiting) == 8:
                with pytest.raises(Rejected):
                    queue.wait(key, now, priority, client)
            else:
                queue.wait(key, now, priority, client)
                waiting.add(key)
        elif kind == "n":
            taken = queue.next(now)
            assert (taken in waiting) if waiting else taken is None
            waiting.discard(taken)
        elif kind == "c":
            assert queue.cancel(key) == (key in waiting)
            waiting.discard(key)
        elif kind == "o":
            late = {key for key, _ in queue.overdue(now)}
            assert late <= waiting
            waiting -= late
        assert len(queue) == len(waiting)
    assert set(drain(queue)) == waiting
