"""If most peers vanish at once, suspect yourself."""

from __future__ import annotations

from collections import deque

ROUNDING_S = 1e-3
"""Less than this left is nothing left: adding it to the time might not change the time."""


class Isolation:
    """The outcome of the last probes: is it them, or is it me? (grafana/dskit PR 1034 is what happens without it.)"""

    def __init__(self, window: int, least: int, hold_s: float) -> None:
        self._outcomes: deque[tuple[str, bool]] = deque(maxlen=window)
        self._least = least
        self._hold_s = hold_s
        self.since: float | None = None

    def note(self, node: str, answered: bool) -> None:
        self._outcomes.append((node, answered))

    def doubtful(self) -> bool:
        """True if at least ``least`` different targets failed last time, and more than half of all those probed."""
        last = dict(self._outcomes)
        failed = sum(not answered for answered in last.values())
        return failed >= self._least and failed * 2 > len(last)

    def held_for(self, now: float) -> float:
        """Seconds that deaths must still wait; begins a hold when the doubt is new, and runs out after ``hold_s``."""
        if self.since is None:
            if not self.doubtful():
                return 0.0
            self.since = now
        left = self.since + self._hold_s - now
        return left if left > ROUNDING_S else 0.0

    def ended(self) -> bool:
        """True once, when the doubt is over."""
        if self.since is None or self.doubtful():
            return False
        self.since = None
        return True
