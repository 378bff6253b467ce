"""Which failed attempts count as lost, and what growth of a process is too much: docs/design/chaos.md has the rules
in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from statistics import median
from typing import NamedTuple

from chaos.client import Attempt

GRACE_S = 2.0
"""From the end of a fault (a restarted process: from its ready line) until the peers that it touched must serve."""

WARM_UP_S = 90.0
"""Of a process's life: caches fill, and the allocator finds its size."""
GROWTH_SPAN_S = 120.0
"""Growth over less than this after the warm-up is not judged: it comes in steps of the allocator's."""
RSS_LIMIT = 1.5
"""MB a minute: three times the most that was seen while caches with a bound still filled (0.2 to 0.5)."""
DESCRIPTOR_SLACK = 32
"""Descriptors more at rest than before all load: a worker keeps its links to the three others whose KV blocks it has
taken, up to ten descriptors each."""


@dataclass
class Trouble:
    """A fault as it was: ``peers`` could not work between the two times, or the ``links`` (unordered pairs) between
    peers that could. ``ended`` is infinite while it lasts."""

    what: str
    began: float
    peers: frozenset[str] = frozenset()
    links: frozenset[frozenset[str]] = frozenset()
    ended: float = math.inf

    def on(self, at: float, until: float | None = None, grace: float = 0.0) -> bool:
        return self.began <= (at if until is None else until) and at < self.ended + grace


def faults_on(attempt: Attempt, troubles: Iterable[Trouble]) -> list[str]:
    return [t.what for t in troubles if t.on(attempt.began, attempt.ended, GRACE_S)]


def lost(attempt: Attempt, troubles: Sequence[Trouble], workers: Collection[str]) -> bool:
    """A failed attempt whose frontend was well, and could at each moment reach a worker that was well."""
    if attempt.right:
        return False
    near = [t for t in troubles if t.on(attempt.began, attempt.ended, GRACE_S)]
    if any(attempt.frontend in trouble.peers for trouble in near):
        return False
    moments = [attempt.began, *(t.began for t in near if t.began > attempt.began)]
    return all(_served(attempt.frontend, moment, near, workers) for moment in moments)


def _served(frontend: str, at: float, troubles: Sequence[Trouble], workers: Collection[str]) -> bool:
    on = [t for t in troubles if t.on(at, grace=GRACE_S)]
    hit = frozenset[str]().union(*(t.peers for t in on))
    cut = frozenset[frozenset[str]]().union(*(t.links for t in on))
    return any(worker not in hit and frozenset((frontend, worker)) not in cut for worker in workers)


class Sample(NamedTuple):
    """Of one process; ``at`` in seconds, ``rss`` in bytes."""

    at: float
    rss: int
    descriptors: int
    threads: int


class Growth(NamedTuple):
    """Of one process after its warm-up."""

    seconds: int
    rss_mb: float
    """In the end."""
    rss_mb_a_minute: float
    descriptors: int
    descriptors_a_minute: float
    """Of the most in each half minute: what is open at a moment depends on the faults of the moment."""
    threads: int

    @property
    def too_much(self) -> bool:
        return self.seconds >= GROWTH_SPAN_S and self.rss_mb_a_minute > RSS_LIMIT


def growth(samples: Sequence[Sample]) -> Growth | None:
    """None if what came after the warm-up is less than a minute."""
    later = [sample for sample in samples if sample.at >= samples[0].at + WARM_UP_S]
    if not later or (seconds := later[-1].at - later[0].at) < 60:
        return None
    rss = _slope(_windows(later, 5.0, lambda window: median([sample.rss for sample in window]) / 1e6))
    descriptors = _slope(_windows(later, 30.0, lambda window: max([sample.descriptors for sample in window])))
    last = later[-1]
    return Growth(
        *(round(seconds), round(last.rss / 1e6, 1), round(rss * 60, 2)),
        *(last.descriptors, round(descriptors * 60, 1), last.threads),
    )


def _windows(
    samples: Iterable[Sample], seconds: float, value: Callable[[list[Sample]], float]
) -> list[tuple[float, float]]:
    """(middle, value) of each window of that many seconds."""
    windows = (list(window) for _, window in groupby(samples, lambda sample: sample.at // seconds))
    return [((window[0].at + window[-1].at) / 2, value(window)) for window in windows]


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Theil and Sen's: the median over all pairs of points, which steps and spikes do not move."""
    slopes = [(late[1] - early[1]) / (late[0] - early[0]) for early, late in combinations(points, 2)]
    return median(slopes) if slopes else 0.0


def descriptors_grown(before: int, after: int) -> bool:
    """Of one peer at rest."""
    return after > before + DESCRIPTOR_SLACK
