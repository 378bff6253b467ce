"""Count what is wrong with what others send, and say so without letting them fill the log."""

from __future__ import annotations

import logging
import time
from collections import Counter

log = logging.getLogger(__name__)

QUIET_S = 60.0
MAX_SOURCES = 512
"""Sources remembered. Beyond that the oldest is forgotten, which costs a repeated line, never memory."""


class Complaints:
    """``counts`` is by kind, for metrics; a line is logged at most once a minute for each kind and source."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._sources: dict[tuple[str, str], tuple[int, float]] = {}

    def add(self, kind: str, source: str, text: str, *, sure: bool = True) -> None:
        """One more of ``kind`` from ``source``, an address. ``text`` is the line to log; what has an innocent cause
        too is not ``sure``, and not logged before it happens again."""
        self.counts[kind] += 1
        now = time.monotonic()
        count, said = self._sources.get((kind, source), (0, now - QUIET_S))
        if now - said >= QUIET_S and (sure or count > 0):
            log.warning("%s", text)
            said = now
        if len(self._sources) >= MAX_SOURCES and (kind, source) not in self._sources:
            del self._sources[next(iter(self._sources))]
        self._sources[kind, source] = (count + 1, said)

    def by_source(self, kind: str) -> dict[str, int]:
        """How many of ``kind`` came from each source."""
        return {source: count for (known, source), (count, _) in self._sources.items() if known == kind}
