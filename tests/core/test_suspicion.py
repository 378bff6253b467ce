"""Suspicion timeouts: memberlist's own table, then the class around it."""

from __future__ import annotations

import pytest

from p2pdyn.core.suspicion import Suspicion, remaining_s


@pytest.mark.parametrize(
    ("confirmations", "needed", "elapsed", "expected"),
    [(0, 3, 0, 30), (1, 3, 2, 14), (2, 3, 3, 4.810), (3, 3, 4, -2), (4, 3, 5, -3), (5, 3, 10, -8), (0, 0, 0, 2)],
)
def test_remaining_time(confirmations: int, needed: int, elapsed: float, expected: float) -> None:
    assert remaining_s(confirmations, needed, elapsed, 2, 30) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("origins", "news", "deadline"),
    [
        ([], [], 130.0),
        (["me"], [False], 130.0),
        ([""], [False], 130.0),
        (["a"], [True], 116.0),
        (["a", "a", "a"], [True, False, False], 116.0),
        (["a", "b"], [True, True], 107.81),
        (["a", "b", "c"], [True, True, True], 102.0),
        (["a", "b", "c", "d"], [True, True, True, False], 102.0),
    ],
)
def test_confirmations_shorten_it(origins: list[str], news: list[bool], deadline: float) -> None:
    suspicion = Suspicion("me", 3, 2, 30, 100.0)
    assert [suspicion.confirm(origin) for origin in origins] == news
    assert suspicion.deadline == pytest.approx(deadline, abs=0.01)


def test_a_restart_gives_the_time_once_more() -> None:
    suspicion = Suspicion("me", 0, 2, 30, 100.0)
    suspicion.restart(150.0)
    assert suspicion.deadline == 152.0
