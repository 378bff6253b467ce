"""The control link's connections out: one DEALER a peer, opened on the first message, closed when idle or broken."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pdyn.constants import CONTROL_IDLE_S, CONTROL_MAX, CONTROL_PING_S
from p2pdyn.core.types import Address
from p2pdyn.net.link import Link
from p2pdyn.net.sockets import Sockets

MAX_LINKS = 64
"""Open at once; the least recently used goes first. Four descriptors each (docs/design/wire.md)."""
MAX_WAITING = 16
"""Messages kept for a connection that is not up yet. Membership repeats what matters."""


@dataclass(slots=True)
class _Connection:
    link: Link
    used: float
    up: bool = False
    waiting: deque[tuple[bytes, ...]] = field(default_factory=lambda: deque(maxlen=MAX_WAITING))


class Pool:
    """``on_answer(address, frames)`` for what comes back, ``on_down(address, reason)`` for a connection that broke or
    could not be made; it is closed by then, and the next message opens a new one."""

    def __init__(
        self,
        sockets: Sockets,
        on_answer: Callable[[Address, list[bytes]], None],
        on_down: Callable[[Address, str], None],
    ) -> None:
        self.unsent = 0
        self._sockets = sockets
        self._on_answer = on_answer
        self._on_down = on_down
        self._loop = asyncio.get_running_loop()
        self._open: OrderedDict[Address, _Connection] = OrderedDict()
        self._sweeper: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    def send(self, address: Address, frames: tuple[bytes, ...]) -> None:
        """Send on the connection to ``address``, opening it if need be. Raises ValueError if that is no IP address."""
        try:
            connection = self._open.get(address) or self._connect(address)
        except OSError:  # out of descriptors, which has been said: as good as a message that was lost
            self.unsent += 1
            return
        connection.used = self._loop.time()
        self._open.move_to_end(address)
        if not connection.up:
            connection.waiting.append(frames)
        elif not connection.link.send(frames):
            self.unsent += 1

    def drop(self, address: Address) -> None:
        """Close the connection to a peer that is suspect or gone: it may be half-open, so the next probe goes on a new
        one. Nothing is reported."""
        connection = self._open.pop(address, None)
        if connection is not None:
            connection.link.close()

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for address in list(self._open):
            self.drop(address)

    def _connect(self, address: Address) -> _Connection:
        while len(self._open) >= MAX_LINKS:
            self.drop(next(iter(self._open)))
        link = self._sockets.dealer(
            address,
            lambda frames: self._on_answer(address, frames),
            max_size=CONTROL_MAX,
            ping_s=CONTROL_PING_S,
            on_up=lambda: self._up(address),
            on_down=lambda reason: self._down(address, reason),
        )
        connection = self._open[address] = _Connection(link, self._loop.time())
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(CONTROL_IDLE_S / 4, self._sweep)
        return connection

    def _up(self, address: Address) -> None:
        connection = self._open[address]
        connection.up = True
        while connection.waiting:
            if not connection.link.send(connection.waiting.popleft()):
                self.unsent += 1

    def _down(self, address: Address, reason: str) -> None:
        self.drop(address)
        self._on_down(address, reason)

    def _sweep(self) -> None:
        idle = self._loop.time() - CONTROL_IDLE_S
        for address in [address for address, connection in self._open.items() if connection.used <= idle]:
            self.drop(address)
        self._sweeper = self._loop.call_later(CONTROL_IDLE_S / 4, self._sweep) if self._open else None
