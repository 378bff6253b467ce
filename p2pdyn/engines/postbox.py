"""What an engine that runs on an event loop in a thread of its own has told, until a step takes it.

The loop's thread puts; the thread that drives the engine, which sleeps until :attr:`Postbox.wakeup_fd` is readable,
takes.  It is woken once a turn of the loop in which something was put: one turn later all outputs of the same engine
step are there.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from contextlib import suppress

from p2pdyn.engines.base import EngineError, Held, Output


class Postbox:
    def __init__(self) -> None:
        self.wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.arrived: deque[Output | Held] = deque()
        self.moved = False
        """The engine has made steps. Told by empty steps of ours, by which load is reported and long prompts show that
        they go on."""
        self.death = ""
        """Why it does not go on, once it does not."""
        self._flushing = False

    # ---- the thread that takes

    @property
    def due(self) -> bool:
        return bool(self.arrived or self.moved or self.death)

    def begin_step(self, error: str = "") -> None:
        """From here on what comes wakes again. Raises EngineError when the engine is dead and all that it had told is
        taken; ``error`` is the last one in its log."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.wakeup_fd)
        self.moved = False
        if self.death and not self.arrived:
            raise EngineError(f"{self.death}: {error}" if error else self.death)

    # ---- the loop's thread

    def put(self, item: Output | Held) -> None:
        self.arrived.append(item)
        self.wake_soon()

    def wake_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._wake()

    # ---- any thread

    def tell_moved(self) -> None:
        self.moved = True
        self._wake()

    def die(self, reason: str) -> None:
        """The first reason counts."""
        self.death = self.death or reason
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self.wakeup_fd, 1)
