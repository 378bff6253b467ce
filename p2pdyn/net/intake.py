"""What reaches one worker's engine of what frontends send: sequences to run, and those to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from p2pdyn.engines.base import Sequence
from p2pdyn.engines.runner import Runner


class Intake:
    """Gathers a batch of messages. ``submitted(tokens)`` hears of the sequences handed to the engine at once."""

    def __init__(self, submitted: Callable[[int], None]) -> None:
        self.runner: Runner | None = None
        self._submitted = submitted
        self._loop = asyncio.get_running_loop()
        self._admitted: list[Sequence] = []
        self._aborted: list[int] = []
        self._submitting = False

    def add(self, sequence: Sequence) -> None:
        self._admitted.append(sequence)

    def abort(self, keys: list[int]) -> None:
        """A cancel right behind its generate must win: what has not reached the engine never does."""
        if self._admitted:
            waiting = {sequence.key for sequence in self._admitted}.intersection(keys)
            if waiting:
                self._admitted = [s for s in self._admitted if s.key not in waiting]
                keys = [key for key in keys if key not in waiting]
        self._aborted += keys

    def batch_done(self) -> None:
        """A batch has been read. Submit one turn of the loop later: a batch is bounded, and a cancel in the next one is
        read in that same turn, before the engine steps."""
        if self._aborted and self.runner is not None:
            self.runner.abort(self._aborted)
            self._aborted = []
        if self._admitted and not self._submitting:
            self._submitting = True
            self._loop.call_soon(self._submit)

    def _submit(self) -> None:
        self._submitting = False
        if self._admitted and self.runner is not None:
            admitted, self._admitted = self._admitted, []
            self.runner.submit(admitted)
            self._submitted(sum(len(sequence.tokens) for sequence in admitted))
