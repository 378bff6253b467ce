"""Which failed attempts count as lost: docs/design/chaos.md has the rule in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from chaos.client import Attempt

GRACE_S = 2.0
"""From the end of a fault (a restarted process: from its ready line) until the peers that it touched must serve."""


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
