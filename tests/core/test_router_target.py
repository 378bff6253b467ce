"""What a frontend believes of a target: an estimate between load reports, never twice the same work."""

from __future__ import annotations

from math import e

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdyn.constants import WORK_MEMORY_S
from p2pdyn.core.router_target import IN_FLIGHT_S, LATE_S, STALE_S, Target
from p2pdyn.core.types import Load, NodeId


def target(tps: float = 1000.0, queued: int = 0, now: float = 0.0) -> Target:
    one = Target(NodeId("a" * 16))
    one.report(Load(prefill_tps=tps, prefill_tokens_queued=queued), now)
    return one


def test_a_report_drains_at_the_measured_speed_and_no_further_than_empty() -> None:
    one = target(queued=500)
    assert one.queue_s(0.0) == pytest.approx(0.5)
    assert one.queue_s(0.2) == pytest.approx(0.3)
    assert one.queue_s(0.9) == 0.0


def test_what_was_sent_since_the_report_is_added_and_drains_as_well() -> None:
    one = target(queued=100)
    one.sent("r", 400, 10, 0.2)
    assert one.queue_s(0.2) == pytest.approx(0.4)
    assert one.queue_s(0.5) == pytest.approx(0.1)


def test_a_report_contains_what_was_sent_before_it_but_for_what_was_on_its_way() -> None:
    one = target()
    one.sent("seen", 300, 5, 0.1)
    one.sent("flying", 200, 5, 0.2 - IN_FLIGHT_S / 2)
    one.report(Load(prefill_tps=1000, prefill_tokens_queued=250, active_requests=1, active_blocks=5), 0.2)
    assert one.queue_s(0.2) == pytest.approx(0.45)
    assert (one.requests, one.decode_blocks) == (2, 10)
    one.report(Load(prefill_tps=1000, prefill_tokens_queued=380, active_requests=2, active_blocks=10), 0.25)
    assert one.queue_s(0.25) == pytest.approx(0.38)
    assert (one.requests, one.decode_blocks) == (2, 10)


def test_what_a_report_shows_beyond_ours_is_the_others() -> None:
    one = target()
    one.sent("r", 300, 5, 0.0)
    one.report(Load(active_requests=3, queued=1, active_blocks=25), 0.2)
    assert (one.requests, one.decode_blocks) == (4, 25)
    one.finished("r", 0.3)
    assert (one.requests, one.decode_blocks) == (3, 20)


def test_work_of_late_is_that_of_all_frontends_and_what_is_on_its_way() -> None:
    one = target()
    one.sent("own", 1000, 5, 0.0)
    assert one.recent_s(0.0) == pytest.approx(1.0)
    one.sent("flying", 500, 5, 0.1 - IN_FLIGHT_S / 2)
    one.report(Load(prefill_tps=1000, prefill_tokens_queued=2900, work_s=3.0), 0.1)
    assert one.recent_s(0.1) == pytest.approx(3.5)
    assert one.recent_s(0.1 + WORK_MEMORY_S) == pytest.approx(3.5 / e)


def test_a_first_token_that_is_overdue_holds_up_the_next_too() -> None:
    """A full batch, which no report tells: the wait itself is the measure."""
    one = target(tps=1000.0)
    one.sent("a", 500, 5, 0.0)
    one.sent("b", 500, 5, 0.0)
    assert one.unstarted == 2
    assert one.late_s(0.5 + LATE_S) == 0.0
    assert one.late_s(4.0) == pytest.approx(3.5 - LATE_S)
    one.first_token("a")
    assert one.late_s(4.0) == pytest.approx(3.0 - LATE_S)
    one.finished("b", 4.0)
    assert (one.late_s(4.0), one.unstarted) == (0.0, 0)


def test_without_reports_all_that_has_no_first_token_counts() -> None:
    one = target()
    one.sent("a", 300, 5, 0.1)
    one.sent("b", 200, 5, 0.1)
    assert one.queue_s(STALE_S + 0.2) == pytest.approx(0.5)
    one.first_token("a")
    assert one.queue_s(STALE_S + 0.2) == pytest.approx(0.2)
    one.finished("b", STALE_S + 0.2)
    assert one.queue_s(STALE_S + 0.2) == 0.0


def test_a_request_cancelled_in_the_queue_takes_its_work_along() -> None:
    one = target(queued=100)
    one.sent("a", 300, 5, 0.0)
    one.finished("a", 0.0)
    assert one.queue_s(0.0) == pytest.approx(0.1)
    one.finished("a", 0.0)
    one.first_token("a")
    assert (one.my_pending, one.my_blocks, one.requests) == (0, 0, 0)


events = st.lists(
    st.tuples(
        st.sampled_from(["sent", "first", "finished", "report"]),
        st.integers(0, 5),
        st.integers(1, 900),
        st.floats(0, 0.3),
    ),
    max_size=60,
)


@given(events)
def test_estimates_stay_in_bounds_and_an_idle_target_costs_nothing(events: list[tuple[str, int, int, float]]) -> None:
    one, now = target(), 0.0
    live: dict[int, bool] = {}
    given = 0
    for kind, key, tokens, gap in events:
        now += gap
        if kind == "sent" and key not in live:
            one.sent(key, tokens, 3, now)
            live[key] = True
            given += tokens
        elif kind == "first":
            one.first_token(key)
        elif kind == "finished":
            one.finished(key, now)
            live.pop(key, None)
        elif kind == "report":
            one.report(Load(prefill_tps=1000, prefill_tokens_queued=tokens, active_requests=1), now)
            given += tokens
        assert 0 <= one.prefill_tokens(now) <= given
        assert one.my_blocks == 3 * len(live)
        assert one.requests >= len(live)
    for key in list(live):
        one.finished(key, now)
    assert one.my_pending == one.my_blocks == 0
    one.report(Load(prefill_tps=1000), now + 1)
    assert (one.queue_s(now + 1), one.requests, one.decode_blocks) == (0, 0, 0)
