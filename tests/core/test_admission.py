"""Who waits when all targets are saturated, in what order, and what those hear who may not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdyn.core.admission import MAX_QUEUED, MAX_RETRY_S, MIN_QUEUED, Admission, Limits, _Turns, saturation
from p2pdyn.core.request import Rejected
from p2pdyn.core.router_target import Target
from p2pdyn.core.share import Share
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
    assert drain(queue) == ["a2", "b0", "b1", "a3", "b2"]


def test_the_dearer_requests_count_for_more() -> None:
    queue = Admission()
    for number in range(3):
        queue.wait(f"long{number}", 0.0, client="long", cost=100)
    for number in range(6):
        queue.wait(f"short{number}", 0.0, client="short", cost=30)
    assert [str(key) for key in drain(queue)][:6] == ["long0", "short0", "short1", "short2", "short3", "long1"]


def test_turns_are_taken_within_each_priority() -> None:
    queue = Admission()
    for number in range(6):
        queue.wait(f"greedy{number}", 0.0, priority=1, client="greedy")
    for number in range(6):
        queue.wait(f"urgent{number}", 0.0, priority=0, client="urgent")
        assert queue.next(0.0) == f"urgent{number}"
    queue.wait("modest", 0.0, priority=1, client="modest")
    assert drain(queue)[:2] == ["greedy0", "modest"]


def test_new_clients_without_end_starve_nobody() -> None:
    queue = Admission()
    for number in range(20):
        queue.wait(f"old{number}", 0.0, client="old")
    served: list[object] = []
    for number in range(400):
        queue.wait(f"new{number}", 0.0, client=f"client{number}")
        queue.wait(f"other{number}", 0.0, client=f"another{number}")
        served += [queue.next(0.0), queue.next(0.0)]
    assert "old9" in served


def test_a_client_that_takes_its_requests_back_owes_nothing_for_them() -> None:
    queue = Admission()
    queue.wait("b0", 0.0, client="b")
    for number in range(5):
        queue.wait(f"a{number}", 0.0, client="a")
        assert queue.cancel(f"a{number}")
    queue.wait("a5", 0.0, client="a")
    queue.wait("b1", 0.0, client="b")
    assert drain(queue) == ["b0", "a5", "b1"]


def test_a_flood_fills_half_of_the_queue_and_two_of_them_a_third_each() -> None:
    def flood(queue: Admission, client: str) -> int:
        for number in range(100):
            try:
                queue.wait((client, number), 0.0, client=client)
            except Rejected:
                return number
        raise AssertionError("never refused")

    queue = Admission(limit=30)
    assert flood(queue, "a") == 15
    assert [flood(queue, client) for client in "bc"] == [8, 4]
    queue.wait("modest", 0.0, client="modest")
    queue = Admission(limit=30)
    for number in range(10):
        for client in "ab":
            queue.wait((client, number), 0.0, client=client)
    for client in "ab":
        with pytest.raises(Rejected):
            queue.wait("one more", 0.0, client=client)


def test_long_prompts_fill_the_queue_by_their_tokens() -> None:
    queue = Admission(max_tokens=10_000)
    queue.wait("first", 0.0, client="a", tokens=4_000)
    with pytest.raises(Rejected, match="1 of your requests"):
        queue.wait("second", 0.0, client="a", tokens=4_000)
    queue.wait("other", 0.0, client="b", tokens=4_000)
    with pytest.raises(Rejected, match="2 requests wait"):
        queue.wait("third", 0.0, client="c", tokens=4_000)
    assert queue.cancel("first")
    queue.wait("third", 0.0, client="c", tokens=4_000)


def test_a_full_queue_is_429_with_the_time_that_the_queue_will_take() -> None:
    queue = Admission(limit=10)
    for key in range(10):
        queue.wait(key, 0.0, client=str(key))
    for step in range(1, 21):
        queue.next(step * 2.0)
        queue.wait(10 + step, step * 2.0, client=str(10 + step))

    def refused(client: str = "late", clear_s: float = 0.0) -> int | None:
        with pytest.raises(Rejected) as rejected:
            queue.wait("late", 40.0, client=client, clear_s=clear_s)
        assert rejected.value.failure.status == 429
        return rejected.value.failure.retry_after

    assert refused() in (20, 21, 22)
    assert refused(clear_s=33.5) == 34
    assert queue.retry_after(40.0, 1e9) == MAX_RETRY_S
    assert len(queue) == 10


@pytest.mark.parametrize(("each_s", "room"), [(0.001, MAX_QUEUED), (0.02, 150), (1.0, MIN_QUEUED)])
def test_what_may_wait_is_what_is_served_in_some_seconds(each_s: float, room: int) -> None:
    queue, now, number = Admission(), 0.0, 0
    while now < 2.0 or number < 10:
        queue.wait(number, now, client="steady")
        queue.wait(-number - 1, now, client="other")
        now += each_s
        queue.next(now)
        queue.next(now)
        number += 1

    def fill(client: str) -> int:
        for number in range(MAX_QUEUED):
            try:
                queue.wait((client, number), now, client=client)
            except Rejected:
                return number
        return MAX_QUEUED

    room = min(MAX_QUEUED, 2 * room if each_s < 1 else room)  # two are served at a time
    assert fill("flood") == pytest.approx(room / 2, rel=0.05)
    assert fill("second") == pytest.approx(room / 4, rel=0.05)
    for number in range(20):
        queue.wait(("one", number), now, client=f"client{number}")


def test_a_client_over_its_share_is_told_when_its_own_will_have_been_served() -> None:
    queue = Admission(limit=100)
    for number in range(30):
        queue.wait(number, 0.0, client="steady")
    for number in range(10):
        assert queue.next(number + 1.0) == number
    for number in range(22):
        queue.wait(100 + number, 10.0, client="flood")
    with pytest.raises(Rejected, match="22 of your requests") as refused:
        queue.wait("late", 10.0, client="flood")
    assert refused.value.failure.retry_after in (41, 42)  # 42 wait, one a second


def test_while_nothing_moves_the_estimate_grows() -> None:
    queue = Admission()
    queue.wait("a", 0.0)
    assert queue.retry_after(0.0) == 1
    assert queue.retry_after(12.0) == 12
    for number in range(40):
        queue.wait(number, 12.0, client=str(number))
    assert queue.next(13.0) == "a"
    assert queue.retry_after(13.0) == 13  # and not 40 times that: one says nothing of a rate


def test_who_waited_too_long_is_told() -> None:
    queue = Admission(wait_s=30)
    queue.wait("a", 0.0)
    queue.wait("b", 10.0)
    assert queue.next_deadline() == 30.0
    assert queue.overdue(29.9) == []
    [(key, failure)] = queue.overdue(30.0)
    assert (key, failure.status) == ("a", 429)
    assert failure.retry_after
    assert queue.next_deadline() == 40.0
    assert queue.next(31.0) == "b"
    assert queue.next_deadline() is None


@given(
    st.lists(
        st.tuples(st.sampled_from("wwnnco"), st.integers(0, 9), st.integers(-1, 1), st.sampled_from("xyz")), max_size=80
    )
)
def test_everybody_leaves_once_by_priority_and_none_waits_while_there_is_room(
    steps: list[tuple[str, int, int, str]],
) -> None:
    queue, now = Admission(limit=8, wait_s=5), 0.0
    waiting: dict[object, tuple[int, str]] = {}
    for kind, key, priority, client in steps:
        now += 1.0
        if kind == "w" and key not in waiting:
            mine = sum(one == client for _, one in waiting.values())
            if mine >= 8 - len(waiting):
                with pytest.raises(Rejected):
                    queue.wait(key, now, priority, client)
            else:
                queue.wait(key, now, priority, client, cost=1.0 + key)
                waiting[key] = priority, client
        elif kind == "n":
            taken = queue.next(now)
            assert (taken in waiting) if waiting else taken is None
            if taken is not None:
                assert waiting[taken][0] == min(one for one, _ in waiting.values())
                del waiting[taken]
        elif kind == "c":
            assert queue.cancel(key) == (key in waiting)
            waiting.pop(key, None)
        elif kind == "o":
            for late, _ in queue.overdue(now):
                del waiting[late]
        assert len(queue) == len(waiting)
    left = [waiting[key][0] for key in drain(queue)]
    assert left == sorted(left)
    assert len(left) == len(waiting)


@given(
    floods=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    costs=st.lists(st.integers(1, 50), min_size=6, max_size=6),
    ahead=st.integers(0, 40),
)
def test_a_newcomer_waits_for_a_turn_of_each_client_at_most(floods: list[int], costs: list[int], ahead: int) -> None:
    """Whatever the others have waiting, and in whatever sizes: beside what is smaller than its own request, one request
    of each."""
    queue = Admission(limit=10_000)
    for client, count in enumerate(floods):
        for number in range(count):
            queue.wait((client, number), 0.0, client=str(client), cost=costs[client])
    for _ in range(min(ahead, sum(floods) - 1)):
        queue.next(0.0)
    queue.wait("newcomer", 0.0, client="newcomer", cost=costs[5])
    before = drain(queue)
    spent = dict.fromkeys(range(len(floods)), 0)
    for key in before[: before.index("newcomer")]:
        assert isinstance(key, tuple)
        spent[key[0]] += costs[key[0]]
    # Start-time fair queueing: unfairness between two is bounded by their largest requests (Goyal et al., theorem 1).
    assert all(cost <= 2 * max(costs) for cost in spent.values())


def test_what_it_remembers_of_clients_is_bounded() -> None:
    queue = Admission(limit=100)
    queue.wait("stays", 0.0, client="stays", cost=1e9)
    for number in range(20_000):
        queue.wait(number, 0.0, client=f"client{number}", cost=1.0 + number % 50)
        if len(queue) > 20:
            queue.next(0.0)
    assert remembered(queue) < 600


def remembered(thing: object, seen: set[int] | None = None) -> int:
    """Entries of all containers of ``thing``."""
    seen = set() if seen is None else seen
    if id(thing) in seen or not isinstance(thing, dict | list | Admission | Share | _Turns):
        return 0
    seen.add(id(thing))
    if isinstance(thing, dict | list):
        inside = thing.values() if isinstance(thing, dict) else thing
        return len(thing) + sum(remembered(one, seen) for one in inside)
    return sum(remembered(one, seen) for one in vars(thing).values())
