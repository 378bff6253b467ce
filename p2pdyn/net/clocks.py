"""Two clocks to watch: other hosts' wall clocks, and how late this loop runs its timers."""

from __future__ import annotations

import asyncio
from collections import deque

from p2pdyn.core.types import NodeId

FRESH_S = 60.0
LAG_EVERY_S = 0.1


class WallClocks:
    """How far each peer's wall clock is ahead of ours, in seconds.

    A message shows the difference less its delay, so the largest value of the last minute is the best one.
    """

    def __init__(self) -> None:
        self._best: dict[NodeId, tuple[float, float]] = {}

    def seen(self, node: NodeId, their_wall_ms: int, our_wall_s: float, now: float) -> None:
        ahead = their_wall_ms / 1000 - our_wall_s
        best, since = self._best.get(node, (ahead, now))
        if ahead >= best or now - since > FRESH_S:
            self._best[node] = (ahead, now)

    def ahead(self, node: NodeId) -> float | None:
        found = self._best.get(node)
        return None if found is None else found[0]

    def forget(self, node: NodeId) -> None:
        self._best.pop(node, None)


class LoopLag:
    """The worst delay of a timer in the last minute. The peer's budget is 0.1 s: nothing here may hold the loop up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._worst: deque[tuple[float, float]] = deque()
        self._timer = loop.call_later(LAG_EVERY_S, self._tick, loop.time() + LAG_EVERY_S)

    @property
    def seconds(self) -> float:
        self._expire(self._loop.time())
        return self._worst[0][1] if self._worst else 0.0

    def _tick(self, due: float) -> None:
        now = self._loop.time()
        lag = max(0.0, now - due)
        while self._worst and self._worst[-1][1] <= lag:
            self._worst.pop()
        self._worst.append((now, lag))
        self._expire(now)
        self._timer = self._loop.call_later(LAG_EVERY_S, self._tick, now + LAG_EVERY_S)

    def _expire(self, now: float) -> None:
        while self._worst and self._worst[0][0] < now - FRESH_S:
            self._worst.popleft()

    def close(self) -> None:
        self._timer.cancel()
