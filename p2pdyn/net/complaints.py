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
        self._said: dict[tuple[str, str], float] = {}

    def add(self, kind: str, source: str, text: str) -> None:
        self.counts[kind] += 1
        now = time.monotonic()
        key = (kind, source)
        if now - self._said.get(key, -QUIET_S) < QUIET_S:
            return
        self._said.pop(key, None)
        if len(self._said) >= MAX_SOURCES:
            del self._said[next(iter(self._said))]
        self._said[key] = now
        log.warning("%s", text)
