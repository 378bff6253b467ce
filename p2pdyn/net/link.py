"""One ZeroMQ socket on the event loop, driven from its file descriptor.

The descriptor is edge-triggered, and any call on the socket may consume the edge: it says only "try to receive".  A
receive that finds nothing has emptied libzmq's command pipe, so what comes later raises a new edge.  After a drain
that stopped at its bound, and after each send, which may have consumed an edge, ZMQ_EVENTS is read once more, one turn
of the loop later.  There is no coroutine and no future a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic

import zmq

from p2pdyn.core.types import Address

BATCH, BATCH_S = 128, 0.005
"""Messages, and seconds, in one turn of the loop: a burst, or a few large prompts, must not hold everything else up."""

MAX_FRAMES = 8
"""Frames of a message that anybody here has a use for; a longer one is dropped as it is read."""

Receive = Callable[[list[bytes]], None]


# Plain integers: pyzmq's enum flags cost a microsecond for each `|` and `&`.
DONTWAIT, MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)
EVENTS, POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_GONE = (int(zmq.EAGAIN), int(zmq.EHOSTUNREACH))


class Pump:
    """Calls ``drain`` in the loop whenever ``socket`` may have input. It receives until there is nothing, or stops at a
    bound and returns True, to be called again."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes], drain: Callable[[], bool]) -> None:
        self._loop = loop
        self._socket = socket
        self._drain = drain
        self._woken = False
        self._fd: int | None = int(socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._run)
        self.wake()

    def wake(self) -> None:
        """Look at ZMQ_EVENTS in the next turn of the loop: call after each send."""
        if not self._woken and self._fd is not None:
            self._woken = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._woken = False
        if self._fd is not None and int(self._socket.getsockopt(EVENTS)) & POLLIN:
            self._run()

    def _run(self) -> None:
        if self._fd is None:
            return
        more = True
        try:
            more = self._drain()
        finally:  # a callback that raises must not leave the rest unread
            if more:
                self.wake()

    def close(self) -> None:
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            self._fd = None


class Link:
    """A bound or connected socket. Made by :class:`p2pdyn.net.sockets.Sockets` only."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        addresses: tuple[Address, ...],
        receive: Receive,
        batch_done: Callable[[], None] | None,
        on_close: Callable[[Link], None],
    ) -> None:
        self.addresses = addresses
        """Bound, with their real ports; or the one connected to."""
        self.unsent = 0
        """Messages that :meth:`send` gave back."""
        self._socket = socket
        self._receive = receive
        self._batch_done = batch_done
        self._on_close = on_close
        self._closed = False
        self._first: zmq.Frame | None = None
        self._pump = Pump(loop, socket, self._drain)

    def send(self, frames: Sequence[bytes | memoryview]) -> bool:
        """Send one message now, or not at all: False when no connection is up, its queue is full (the high-water mark),
        or, on a ROUTER, the connection that the first frame names is gone. Never blocks, never raises for these."""
        if self._closed:
            return False
        try:
            for frame in frames[:-1]:
                self._socket.send(frame, MORE)
            self._socket.send(frames[-1], DONTWAIT)
            sent = True
        except zmq.ZMQError as error:  # at the first frame; or at the last, and then libzmq takes the others back
            if error.errno not in _GONE:
                raise
            self.unsent += 1
            sent = False
        self._pump.wake()
        return sent

    def sender(self) -> str:
        """The host that the message being received came from: inside ``receive`` only."""
        try:
            return str(self._first.get("Peer-Address")) if self._first is not None else "somebody"
        except zmq.ZMQError:
            return "somebody"

    def wake(self) -> None:
        """Look for input: after any other use of the socket."""
        self._pump.wake()

    def close(self) -> None:
        """Drop everything queued and the connections. Idempotent; may be called from any callback."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            self._pump.close()
            self._socket.close(linger=0)

    def _drain(self) -> bool:
        try:
            until = monotonic() + BATCH_S
            for _ in range(BATCH):
                message = read_message(self._socket)
                if message is None:
                    return False
                self._first, frames = message
                if len(frames) <= MAX_FRAMES:
                    self._receive(frames)
                if self._closed or monotonic() > until:
                    break
        finally:
            self._first = None
            if self._batch_done is not None and not self._closed:
                self._batch_done()
        return True


def read_message(socket: zmq.Socket[bytes]) -> tuple[zmq.Frame, list[bytes]] | None:
    """The next message: its first frame with ZeroMQ's metadata, and all frames. None if there is none.

    At most MAX_FRAMES + 1 frames: the rest is read and dropped.
    """
    try:
        first = frame = socket.recv(DONTWAIT, copy=False)
    except zmq.Again:
        return None
    frames = [first.bytes]
    while frame.more:  # asking the socket (RCVMORE) costs as much as receiving
        frame = socket.recv(DONTWAIT, copy=False)
        if len(frames) <= MAX_FRAMES:
            frames.append(frame.bytes)
    return first, frames
