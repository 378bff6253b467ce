"""What ZeroMQ does behind the scenes, from its socket monitors: connections up and down, refused handshakes, by whom.

A connecting socket is left by libzmq for ever after a protocol error (a wrong key is one), so the :class:`Dialer` dials
again itself, with the next cluster key.  :mod:`p2pdyn.net.doorman` watches the binding ones.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count

import zmq

from p2pdyn.core.types import Address
from p2pdyn.net.complaints import Complaints
from p2pdyn.net.curve import Keypair
from p2pdyn.net.link import BATCH, Pump, read_message

CONNECT_S = 2.0
"""A connect() without an answer is given up after this long (the kernel would take two minutes)."""
HANDSHAKE_S = 5.0
"""Connect to ready. Generous, because ZAP is answered by an event loop that may be busy."""
REDIAL_S = 2.0
"""Between two attempts when every key was refused."""

_EVENT = struct.Struct("=HI")
_DIAL_EVENTS = (
    zmq.EVENT_CONNECT_DELAYED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)
MISMATCH = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)

_names = count()


class Monitor:
    """Hands a socket's events to ``on_event(event, value)``. ``value`` is an errno, descriptor or code, by event."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watched: zmq.Socket[bytes],
        events: int,
        on_event: Callable[[int, int], None],
    ) -> None:
        name = f"inproc://monitor-{next(_names)}"
        self._watched = watched
        self._on_event = on_event
        watched.monitor(name, events)
        self._socket: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
        # libzmq's thread waits, holding a lock that close() needs, where a monitor's queue is full.
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(name)
        self._pump = Pump(loop, self._socket, self._drain)

    def _drain(self) -> bool:
        for _ in range(BATCH):
            if self._socket.closed or (message := read_message(self._socket)) is None:
                return False
            self._on_event(*_EVENT.unpack(message[1][0]))
        return True

    def close(self) -> None:
        """Before the watched socket is closed."""
        self._pump.close()
        self._watched.monitor(None, 0)
        self._socket.close(linger=0)


class Dialer:
    """Keeps one socket connected to one address, trying the cluster keys in turn: those that ``keys`` gives by then.

    ``on_up`` is called when a connection is ready to send, ``on_down`` with a sentence when an established one is lost
    and once for each series of failed attempts.  It goes on dialling in the background until :meth:`close`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        address: Address,
        keys: Callable[[], Sequence[Keypair]],
        complaints: Complaints,
        on_up: Callable[[], None] | None,
        on_down: Callable[[str], None] | None,
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._address = address
        self._keys = keys
        self._complaints = complaints
        self._on_up = on_up
        self._on_down = on_down
        self._tried: list[Keypair] = []
        """Keys refused since the last connection, or since all were."""
        self._key: Keypair | None = None
        """Dialled with last."""
        self._dialled = False
        self._up = False
        self._told = False
        self._started = loop.time()
        self._redial: asyncio.TimerHandle | None = None
        self._monitor = Monitor(loop, socket, _DIAL_EVENTS, self._event)
        self._dial()

    def _dial(self) -> None:
        self._redial = None
        if self._dialled:
            with suppress(zmq.ZMQError):  # libzmq may have forgotten the endpoint
                self._socket.disconnect(self._address.endpoint)
        self._dialled = True
        key = self._next_key()
        if key is not None:
            # The same pair as server key and as our own: a peer that serves with it accepts it.
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, key.public)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
            self._key = key
        self._socket.connect(self._address.endpoint)

    def _next_key(self) -> Keypair | None:
        return next((key for key in self._keys() if key not in self._tried), None)

    def _event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_CONNECT_DELAYED:
            self._started = self._loop.time()
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._up, self._told = True, False
            self._tried.clear()
            if self._on_up is not None:
                self._on_up()
        elif event == zmq.EVENT_DISCONNECTED and self._up:
            self._up = False
            self._tell(f"the connection to {self._address} was lost")
        elif event == zmq.EVENT_CLOSED and not self._up:
            late = self._loop.time() - self._started >= 0.9 * CONNECT_S
            self._tell(f"{self._address} does not answer" if late else f"{self._address} refused the connection")
        elif event in _FAILED and self._redial is None:
            self._refused(event, value)

    def _refused(self, event: int, value: int) -> None:
        self._up = False
        if self._key is not None:
            self._tried.append(self._key)
            if self._next_key() is not None:
                self._redial = self._loop.call_later(0, self._dial)
                return
        self._tried.clear()
        self._redial = self._loop.call_later(REDIAL_S, self._dial)
        text = f"{self._address} {_why_refused(event, value, bool(self._keys()))}"
        sure = event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL  # it may just have been restarted
        self._complaints.add("refused-by", str(self._address), text, sure=sure)
        self._tell(text)

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            if self._on_down is not None:
                self._on_down(reason)

    def close(self) -> None:
        if self._redial is not None:
            self._redial.cancel()
        self._monitor.close()


def _why_refused(event: int, value: int, have_key: bool) -> str:
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "refused this peer's cluster key: give both the same --cluster-key file"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == MISMATCH:
        if have_key:
            return "has no cluster key, but this peer has one: start it with the same --cluster-key file"
        return "wants a cluster key, but this peer has none: start this peer with its cluster's --cluster-key file"
    # A server that minds the key often hangs up before it has said so.
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and value != zmq.EAGAIN:
        if have_key:
            return (
                "hung up on this peer's cluster key: it has another one, or none; give both the same --cluster-key file"
            )
        return "hung up: if it wants a cluster key, start this peer with its cluster's --cluster-key file"
    return "does not answer as a p2pdyn peer: check its address and port"
