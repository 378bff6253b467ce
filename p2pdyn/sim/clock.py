"""Virtual time: a heap of calls. Nothing waits; a minute passes as fast as its events are computed."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """``now`` is the time of the call being run, in seconds. Calls for one time run in the order they were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0
        self.events = 0

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (when if when > self.now else self.now, self._serial, call, args))

    def run(self, until: float) -> None:
        """Run all calls due up to ``until``; afterwards it is ``until``."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, call, args = pop(heap)
            self.events += 1
            call(*args)
        self.now = until
