"""Lifeguard's local health score."""

from __future__ import annotations

import pytest

from p2pdyn.core.awareness import Awareness


@pytest.mark.parametrize(
    ("deltas", "score", "scaled"),
    [
        ([], 0, 1.0),
        ([-1], 0, 1.0),
        ([-10], 0, 1.0),
        ([1], 1, 2.0),
        ([1, -1], 0, 1.0),
        ([10], 7, 8.0),
        ([10, 10], 7, 8.0),
        ([10, -1], 6, 7.0),
        ([10, -1, -1], 5, 6.0),
        ([10, -10], 0, 1.0),
    ],
)
def test_score_stays_in_bounds_and_scales_times(deltas: list[int], score: int, scaled: float) -> None:
    awareness = Awareness(8)
    for delta in deltas:
        awareness.add(delta)
    assert awareness.score == score
    assert awareness.scale(1.0) == scaled


def test_worst() -> None:
    awareness = Awareness(8)
    awareness.worst()
    assert awareness.score == 7
