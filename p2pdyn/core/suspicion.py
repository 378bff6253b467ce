"""Lifeguard's suspicion timeout: the more independent origins, the sooner it ends."""

from __future__ import annotations

import math


def remaining_s(confirmations: int, needed: int, elapsed_s: float, min_s: float, max_s: float) -> float:
    """Seconds left of a suspicion that began ``elapsed_s`` ago; negative when it is over.

    From ``max_s`` with no confirmation down to ``min_s`` with ``needed``, on a log scale: the first confirmation
    tells most (Lifeguard, section IV-B).
    """
    fraction = math.log(confirmations + 1) / math.log(needed + 1) if needed else 1.0
    return max(min_s, max_s - fraction * (max_s - min_s)) - elapsed_s


class Suspicion:
    """One suspected member: who said so and when it will count as dead."""

    __slots__ = ("_max_s", "_min_s", "_needed", "_origins", "started")

    def __init__(self, origin: str, needed: int, min_s: float, max_s: float, now: float) -> None:
        self._origins = {origin}
        self._needed = needed
        self._min_s = min_s
        self._max_s = max_s
        self.started = now

    @property
    def confirmations(self) -> int:
        return len(self._origins) - 1

    @property
    def deadline(self) -> float:
        return self.started + remaining_s(self.confirmations, self._needed, 0.0, self._min_s, self._max_s)

    def accused_by(self, origin: str) -> bool:
        return origin in self._origins

    def confirm(self, origin: str) -> bool:
        """Count an accuser. True if it was news, worth passing on; origins past the needed number are not, nor is an
        unnamed one (from a Sync: it may be somebody who was counted already)."""
        if not origin or origin in self._origins or self.confirmations >= self._needed:
            return False
        self._origins.add(origin)
        return True

    def restart(self, now: float) -> None:
        """Give the full time once more (after this node doubted itself)."""
        self.started = now
