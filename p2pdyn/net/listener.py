"""A bound socket's listening ports, and the cluster key that it serves with.

libzmq takes the serving key when it starts to listen, so another key needs another listener on the same port, and the
connections of the old listener go with it: whoever has only the old key is out from then on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence

import zmq

from p2pdyn.core.types import Address
from p2pdyn.net.complaints import Complaints
from p2pdyn.net.curve import Keypair
from p2pdyn.net.doorman import Doorman
from p2pdyn.net.zap import DOMAIN

log = logging.getLogger(__name__)

BACKLOG = 512
RETRY_S, RETRY_MAX_S = 0.005, 1.0
"""Between attempts to listen again: libzmq closes the old listener in its own thread, a few milliseconds later."""


class Listener:
    """Binds ``socket`` and, with a key, makes it a CURVE server. ``touched`` is called after each use of the socket
    outside its own drain."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        complaints: Complaints,
        touched: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._touched = touched
        self._bound: list[tuple[Address, str]] = []
        """What was asked for, with its real port, and libzmq's name of it."""
        self._retry: asyncio.TimerHandle | None = None
        self._doorman = Doorman(loop, socket, complaints)
        socket.setsockopt(zmq.BACKLOG, BACKLOG)

    def bind(self, addresses: Sequence[Address], key: Keypair | None) -> tuple[Address, ...]:
        """The addresses with their real ports. Raises OSError with a sentence; what is bound by then stays so."""
        self._serve_with(key)
        for address in addresses:
            port = address.port or (self._bound[0][0].port if self._bound else 0)
            wanted = Address(address.host, port)
            try:
                self._bound.append(self._listen(wanted))
            except zmq.ZMQError as error:
                raise OSError(error.errno, _why_not_bound(wanted, error)) from None
        self._doorman.ports = frozenset([address.port for address, _ in self._bound])
        return tuple([address for address, _ in self._bound])

    def change_key(self, key: Keypair) -> None:
        """Listen on the same ports with another key. Every connection is cut; their owners dial again."""
        for _, endpoint in self._bound:
            self._socket.unbind(endpoint)
        self._serve_with(key)
        waiting, self._bound = [address for address, _ in self._bound], []
        self._listen_again(waiting, RETRY_S)

    def _serve_with(self, key: Keypair | None) -> None:
        if key is None:
            return
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
        self._socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def _listen(self, address: Address) -> tuple[Address, str]:
        self._socket.setsockopt(zmq.IPV6, ":" in address.host)
        self._socket.bind(address.endpoint)
        last = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(last, bytes)
        endpoint = last.rstrip(b"\0").decode("ascii")
        return Address(address.host, int(endpoint.rpartition(":")[2])), endpoint

    def _listen_again(self, waiting: list[Address], wait_s: float) -> None:
        self._retry = None
        while waiting:
            try:
                self._bound.append(self._listen(waiting[0]))
            except zmq.ZMQError as error:
                if wait_s == RETRY_MAX_S:
                    log.error("%s; trying again", _why_not_bound(waiting[0], error))
                wait_s = min(2 * wait_s, RETRY_MAX_S)
                self._retry = self._loop.call_later(wait_s, self._listen_again, waiting, wait_s)
                break
            waiting = waiting[1:]
        self._touched()

    def close(self) -> None:
        """Before the socket is closed."""
        if self._retry is not None:
            self._retry.cancel()
        self._doorman.close()


def _why_not_bound(address: Address, error: zmq.ZMQError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{address} is in use already: stop what listens there, or choose another --port"
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return f"{address} is not an address of this host: choose another --listen"
    return f"cannot listen on {address}: {error.strerror}"
