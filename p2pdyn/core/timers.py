"""Deadlines of one core, as values: a shell or a simulator asks for the next one and calls when it has come."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

ROUNDING_S = 1e-6
"""A deadline goes out and comes back through additions: one that missed by a rounding error would come up for ever."""

Timer = tuple[str, object]
"""(kind, subject)."""


class Timers:
    """At most one deadline a (kind, subject); arming again replaces it. Cancelled ones stay in the heap until seen."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._live: dict[Timer, int] = {}
        self._serial = 0

    def arm(self, at: float, kind: str, subject: object = None) -> None:
        self._serial += 1
        timer = (kind, subject)
        self._live[timer] = self._serial
        heapq.heappush(self._heap, (at, self._serial, timer))

    def cancel(self, kind: str, subject: object = None) -> None:
        self._live.pop((kind, subject), None)

    def armed(self, kind: str, subject: object = None) -> bool:
        return (kind, subject) in self._live

    def clear(self) -> None:
        self._heap.clear()
        self._live.clear()

    def next(self) -> float | None:
        """The earliest live deadline."""
        heap, live = self._heap, self._live
        while heap:
            at, serial, timer = heap[0]
            if live.get(timer) == serial:
                return at
            heapq.heappop(heap)
        return None

    def due(self, now: float) -> Iterator[Timer]:
        """Take each timer whose time has come, in order, those armed meanwhile included."""
        while (at := self.next()) is not None and at <= now + ROUNDING_S:
            _, _, timer = heapq.heappop(self._heap)
            del self._live[timer]
            yield timer
