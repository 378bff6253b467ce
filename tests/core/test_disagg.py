"""Whether a prompt is computed by a prefill worker: the sides' seconds, and the reason given."""

from __future__ import annotations

import pytest

from p2pdyn.core.disagg import (
    MIN_REMOTE_TOKENS,
    OVERHEAD_S,
    PULL_BPS,
    STALL_WEIGHT,
    TOKEN_PULL_S,
    Side,
    judge,
    pull_s,
)

BLOCK = 16


def test_the_seconds_of_both_sides() -> None:
    local = Side(uncached=8000, queue_s=0.5, tps=4000.0, decodes=7, pull_s=0.25)
    remote = Side(uncached=6000, queue_s=0.125, tps=8000.0)
    verdict = judge(local, remote, BLOCK, 0.0625)
    assert verdict.local_s == pytest.approx(0.5 + 0.25 + 2.0 * (1 + STALL_WEIGHT * 8))
    assert verdict.remote_s == pytest.approx(0.125 + 0.75 + 0.0625)
    assert (verdict.remote, verdict.why) == (True, "remote")


@pytest.mark.parametrize(
    ("local", "prefill", "moving_s", "why"),
    [
        (Side(4000, 0.0, 1000.0), Side(4000, 0.0, 1000.0), 0.1, "remote"),
        (Side(4000, 0.0, 1000.0), Side(4000, 0.0, 1000.0), 1.5, "local is faster"),
        (Side(4000, 0.0, 1000.0), Side(4000, 0.0, 500.0), 0.1, "local is faster"),
        (Side(4000, 0.0, 1000.0), Side(4000, 3.0, 1000.0), 0.1, "prefill busy"),
        (Side(4000, 3.0, 1000.0), Side(4000, 3.0, 1000.0), 0.1, "remote"),
        (Side(4000, 0.0, 1000.0, decodes=20), Side(4000, 3.0, 1000.0), 0.1, "remote"),
        (Side(BLOCK, 9.0, 1.0), Side(BLOCK, 0.0, 1000.0), 0.0, "short"),
        (Side(BLOCK, 9.0, 1.0), None, 0.0, "short"),
        (Side(4000, 0.0, 1000.0), None, 0.0, "no prefill worker"),
        # One speed known serves for both, as long as nothing better is.
        (Side(4000, 0.0, 0.0), Side(4000, 0.0, 1000.0), 0.1, "remote"),
        (Side(4000, 0.0, 1000.0), Side(4000, 0.0, 0.0), 1.5, "local is faster"),
    ],
)
def test_who_computes_and_why(local: Side, prefill: Side | None, moving_s: float, why: str) -> None:
    verdict = judge(local, prefill, BLOCK, moving_s)
    assert (verdict.remote, verdict.why) == (why == "remote", why)
    assert (verdict.remote_s is None) == (prefill is None)


def test_without_any_measured_speed_the_length_decides() -> None:
    def why(tokens: int, queue_s: float = 0.0) -> str:
        return judge(Side(tokens, 0.0, 0.0), Side(tokens, queue_s, 0.0), BLOCK, 9.0).why

    assert why(MIN_REMOTE_TOKENS - 1) == "short"
    assert why(MIN_REMOTE_TOKENS) == "remote"
    assert why(MIN_REMOTE_TOKENS, queue_s=0.1) == "prefill busy"


def test_a_saturated_prefill_worker_gets_nothing() -> None:
    verdict = judge(Side(4000, 90.0, 1000.0), Side(4000, 40.0, 1000.0), BLOCK, 0.1, saturated=True)
    assert (verdict.remote, verdict.why) == (False, "prefill busy")


def test_what_moving_takes() -> None:
    assert pull_s(1600, BLOCK, 1_000_000, 1e9) == pytest.approx(OVERHEAD_S + 0.1)
    assert pull_s(1600, BLOCK, 1_000_000, 0.0) == pytest.approx(OVERHEAD_S + 1e8 / PULL_BPS)
    assert pull_s(12_000, BLOCK, 0, 0.0) == pytest.approx(OVERHEAD_S + 12_000 * TOKEN_PULL_S) == pytest.approx(0.046)
