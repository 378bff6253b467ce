"""A bounded amount, shared out so that whoever takes much runs out of it before the others do."""

from __future__ import annotations


class Share:
    """At most ``limit`` in all, and nobody more than ``greed`` times what is free: dynamic thresholds (Choudhury and
    Hahne 1998). With greed 1 one alone gets half of it, two a third each; with 3 one alone gets three fourths.

    Remembers those who hold something, nobody else.
    """

    def __init__(self, limit: int, greed: int = 1) -> None:
        self.limit = limit
        self.greed = greed
        self.total = 0
        self.held: dict[str, int] = {}

    @property
    def free(self) -> int:
        return self.limit - self.total

    def of(self, who: str) -> int:
        """What ``who`` holds."""
        return self.held.get(who, 0)

    def allows(self, who: str, amount: int = 1) -> bool:
        """Whether ``who`` may have ``amount`` more."""
        free = self.limit - self.total
        return amount <= free and self.held.get(who, 0) + amount <= self.greed * free

    def take(self, who: str, amount: int = 1) -> None:
        """Count ``amount``, allowed or not."""
        self.total += amount
        self.held[who] = self.held.get(who, 0) + amount

    def give(self, who: str, amount: int = 1) -> None:
        """Give back what was taken."""
        self.total -= amount
        left = self.held[who] - amount
        if left:
            self.held[who] = left
        else:
            del self.held[who]
