"""How commands end."""

from __future__ import annotations

FAILED = 1
USAGE = 2
INTERRUPTED = 130


class Failure(Exception):
    """One sentence with the mend for stderr, and the exit code."""

    def __init__(self, sentence: str, code: int = FAILED) -> None:
        super().__init__(sentence)
        self.code = code
