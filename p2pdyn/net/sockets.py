"""The one place where ZeroMQ sockets are made, and what is set on each.

docs/design/wire.md says which trap each option closes.  All addresses are IP literals or ``localhost``: libzmq would
resolve a name in its I/O thread, and hold up every connection while it waits.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from p2pdyn.core.types import Address
from p2pdyn.net.complaints import Complaints
from p2pdyn.net.curve import Keypair, Security
from p2pdyn.net.link import Link, Receive
from p2pdyn.net.listener import Listener
from p2pdyn.net.monitor import CONNECT_S, HANDSHAKE_S, Dialer
from p2pdyn.net.zap import ZapHandler

HIGH_WATER = 2000
"""Messages queued a connection and direction. A frontend that reads nothing for 20 s of engine steps is past help."""
EVENT_HIGH_WATER = 20_000
"""KV events come in bursts, and a lost one costs a snapshot."""
MAX_SOCKETS = 16_384
"""libzmq's default of 1023 is reached by a frontend with 256 workers."""
PING_S = 2.0
"""ZMTP heartbeats only clear away half-open connections; liveness is decided by the messages on top."""


@dataclass(frozen=True, slots=True)
class IpcAddress(Address):
    """A Unix socket of this host: ``host`` is its path. Only to connect to."""

    port: int = 0

    def __str__(self) -> str:
        return self.endpoint

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.host}"


class Sockets:
    """Owns the ZeroMQ context and the ZAP handler. Make it, and use it, inside the running loop, in one thread."""

    def __init__(self, security: Security) -> None:
        self.security = security
        self.complaints = Complaints()
        """Failed handshakes by kind: refused-key, bad-handshake, abandoned-handshake; refused-by: of our own."""
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._links: dict[Link, Listener | Dialer] = {}
        self._zap = ZapHandler(self._loop, self._context, security.keys, self.complaints) if security.keys else None

    def router(
        self,
        addresses: Sequence[Address],
        receive: Receive,
        *,
        max_size: int,
        batch_done: Callable[[], None] | None = None,
        ping_s: float = PING_S,
        high_water: int = HIGH_WATER,
    ) -> Link:
        """Bind a ROUTER; the first frame of each message is the connection's routing id, never one used before.

        Ports 0 pick one free port for all addresses.  Raises OSError, or PermissionError for an address that only a
        cluster with a key may bind, with a sentence for the user.
        """
        socket = self._socket(zmq.ROUTER, max_size, high_water, ping_s)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        return self._bound(socket, addresses, receive, batch_done)

    def dealer(
        self,
        address: Address,
        receive: Receive,
        *,
        max_size: int,
        batch_done: Callable[[], None] | None = None,
        on_up: Callable[[], None] | None = None,
        on_down: Callable[[str], None] | None = None,
        ping_s: float = PING_S,
        high_water: int = HIGH_WATER,
        plain: bool = False,
    ) -> Link:
        """Connect a DEALER. ``send`` gives False until ``on_up``, and what is queued when the connection breaks is
        dropped. ``on_down`` tells, in a sentence, that it broke, or once that it cannot be made; the link goes on
        trying until it is closed. ``plain``: without the cluster key, for what is not ours. Raises ValueError for an
        address that is no IP literal."""
        socket = self._socket(zmq.DEALER, max_size, high_water, ping_s)
        return self._connected(socket, address, receive, batch_done, on_up, on_down, plain)

    def xpub(
        self, addresses: Sequence[Address], *, max_size: int, on_subscribe: Callable[[bytes, bool], None] | None = None
    ) -> Link:
        """Bind an XPUB. ``on_subscribe(topic, True)`` at a topic's first subscriber, ``(topic, False)`` after its last.
        A slow subscriber loses messages without notice, so every message carries a sequence number."""

        def receive(frames: list[bytes]) -> None:
            if on_subscribe is not None and frames[0][:1] in (b"\0", b"\1"):
                on_subscribe(frames[0][1:], frames[0][0] == 1)

        return self._bound(self._socket(zmq.XPUB, max_size, EVENT_HIGH_WATER), addresses, receive, None)

    def sub(
        self,
        address: Address,
        receive: Receive,
        topics: Sequence[bytes],
        *,
        max_size: int,
        batch_done: Callable[[], None] | None = None,
        on_up: Callable[[], None] | None = None,
        on_down: Callable[[str], None] | None = None,
        plain: bool = False,
    ) -> Link:
        """Connect a SUB to an XPUB. Subscriptions are renewed with each connection. ``plain`` as in :meth:`dealer`."""
        socket = self._socket(zmq.SUB, max_size, EVENT_HIGH_WATER)
        for topic in topics:
            socket.subscribe(topic)
        return self._connected(socket, address, receive, batch_done, on_up, on_down, plain)

    def change_keys(self, security: Security) -> None:
        """Take another set of cluster keys into use: who is let in and what is dialled with, at once. Where the first
        key is another one, the bound links serve with it from now on, and their connections are cut, to be dialled
        again by the other side. Raises ValueError where one of the two has no key: that needs a restart."""
        if not self.security.keys or not security.keys or self._zap is None:
            raise ValueError("a running peer cannot take its first cluster key, nor give up its last: restart it")
        before, self.security = self.security, security
        self._zap.let_in(security.keys)
        if security.keys[0] != before.keys[0]:
            for listener in [kept for kept in self._links.values() if isinstance(kept, Listener)]:
                listener.change_key(security.keys[0])

    def close(self) -> None:
        """Close every link, then the context. Idempotent."""
        for link in list(self._links):
            link.close()
        if self._zap is not None:
            self._zap.close()
            self._zap = None
        self._context.term()  # at once: nothing lingers

    def _socket(self, kind: int, max_size: int, high_water: int, ping_s: float = PING_S) -> zmq.Socket[bytes]:
        try:
            socket = self._context.socket(kind)
        except zmq.ZMQError as error:
            raise self._no_socket(error) from None
        ping = int(ping_s * 1000)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, high_water),
            (zmq.RCVHWM, high_water),
            (zmq.MAXMSGSIZE, max_size),
            (zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000)),
            (zmq.HEARTBEAT_IVL, ping),
            (zmq.HEARTBEAT_TIMEOUT, 2 * ping),
            (zmq.HEARTBEAT_TTL, 4 * ping),
        ):
            socket.setsockopt(option, value)
        return socket

    def _no_socket(self, error: zmq.ZMQError) -> OSError:
        text = f"a socket to another peer cannot be opened: {error.strerror}"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            text = (
                "out of file descriptors: no socket to another peer can be opened; raise the limit (ulimit -n, "
                "LimitNOFILE= in a systemd unit)"
            )
            self.complaints.add("out-of-descriptors", "", text)
        return OSError(error.errno, text)

    def _bound(
        self,
        socket: zmq.Socket[bytes],
        addresses: Sequence[Address],
        receive: Receive,
        batch_done: Callable[[], None] | None,
    ) -> Link:
        link: Link | None = None

        def touched() -> None:
            if link is not None:
                link.wake()

        listener = Listener(self._loop, socket, self.complaints, touched)
        try:
            literal = [_literal(address) for address in addresses]
            for address in literal:
                self.security.check_bind(address)
            bound = listener.bind(literal, self.security.keys[0] if self.security.keys else None)
        except BaseException:
            listener.close()
            socket.close(linger=0)
            raise
        link = self._link(socket, bound, receive, batch_done, listener)
        return link

    def _connected(
        self,
        socket: zmq.Socket[bytes],
        address: Address,
        receive: Receive,
        batch_done: Callable[[], None] | None,
        on_up: Callable[[], None] | None,
        on_down: Callable[[str], None] | None,
        plain: bool,
    ) -> Link:
        try:
            target = _literal(address)
        except ValueError:
            socket.close(linger=0)
            raise
        for option, value in (
            (zmq.IPV6, ":" in target.host),
            (zmq.IMMEDIATE, 1),
            (zmq.CONNECT_TIMEOUT, int(CONNECT_S * 1000)),
            (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 2000),
        ):
            socket.setsockopt(option, value)

        def keys() -> tuple[Keypair, ...]:
            return () if plain else self.security.keys

        try:
            dialer = Dialer(self._loop, socket, target, keys, self.complaints, on_up, on_down)
        except zmq.ZMQError as error:  # its monitor needs a socket too
            socket.close(linger=0)
            raise self._no_socket(error) from None
        return self._link(socket, (address,), receive, batch_done, dialer)

    def _link(
        self,
        socket: zmq.Socket[bytes],
        addresses: tuple[Address, ...],
        receive: Receive,
        batch_done: Callable[[], None] | None,
        end: Listener | Dialer,
    ) -> Link:
        link = Link(self._loop, socket, addresses, receive, batch_done, self._forget)
        self._links[link] = end
        return link

    def _forget(self, link: Link) -> None:
        self._links.pop(link).close()


def _literal(address: Address) -> Address:
    """The address with an IP literal as host. Raises ValueError with a sentence for any other name."""
    if isinstance(address, IpcAddress):
        return address
    if address.host == "localhost":
        return Address("127.0.0.1", address.port)
    try:
        ipaddress.ip_address(address.host)
    except ValueError:
        raise ValueError(f"{address} is not an IP address: resolve the name first") from None
    return address
