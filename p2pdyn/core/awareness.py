"""Lifeguard's local health multiplier (Dadgar, Phillips, Currey: "Lifeguard", 2017, section IV-A)."""

from __future__ import annotations


class Awareness:
    """How much this node doubts itself: 0 is healthy, ``limit - 1`` the worst. Probe times are scaled by score + 1."""

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self.score = 0

    def add(self, delta: int) -> None:
        """Positive: signs of own trouble (missing nacks, a refutation of oneself). Negative: an answered probe."""
        self.score = min(max(self.score + delta, 0), self._limit - 1)

    def worst(self) -> None:
        self.score = self._limit - 1

    def scale(self, seconds: float) -> float:
        return seconds * (self.score + 1)
