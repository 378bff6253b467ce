"""`p2pdyn`, but its reads of other workers' KV blocks wait while a file exists: ``held_node.py FOLDER ARGUMENTS...``

``FOLDER/before`` keeps a read from starting, ``FOLDER/after`` keeps its end from being told, however often it is
cancelled, as a transfer that hangs would.  The bytes are moved by the real mover.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from p2pdyn.cli.main import main
from p2pdyn.transfer import choose

POLL_S = 0.01


class Held:
    """A mover whose reads wait."""

    def __init__(self, mover: Any, folder: Path) -> None:
        self._mover = mover
        self._folder = folder
        self._tickets = count(1)
        self._begun: dict[int, int] = {}
        self._waiting: dict[int, Callable[[str], None]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mover, name)

    @property
    def reads(self) -> int:
        return self._mover.reads + len(self._waiting)

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], done: Callable[[str], None]) -> int:
        ticket = next(self._tickets)

        def start() -> None:
            if self._waiting.pop(ticket, None) is not None:
                self._begun[ticket] = self._mover.read(peer, remote, local, over)

        def over(error: str) -> None:
            self._when_gone("after", lambda: done(error))

        self._waiting[ticket] = done
        self._when_gone("before", start)
        return ticket

    def cancel(self, ticket: int) -> None:
        done = self._waiting.pop(ticket, None)
        if done is not None:
            asyncio.get_running_loop().call_soon(done, "cancelled")
        elif ticket in self._begun:
            self._mover.cancel(self._begun[ticket])

    def _when_gone(self, name: str, then: Callable[[], None]) -> None:
        if (self._folder / name).exists():
            asyncio.get_running_loop().call_later(POLL_S, self._when_gone, name, then)
        else:
            then()


def held(folder: Path) -> None:
    real = choose.choose

    def made(*args: Any, **more: Any) -> Any:
        return Held(real(*args, **more), folder)

    choose.choose = made


if __name__ == "__main__":
    held(Path(sys.argv[1]))
    main(sys.argv[2:])
