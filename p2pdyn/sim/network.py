"""Two models of the links between simulated nodes.

``datagram``: each message is lost with probability ``loss``, or arrives after a short delay, in any order.

``tcp``: what the product's ZeroMQ links do. A connection is opened by a handshake and closed when idle; a lost segment
is sent again after 0.2 s, 0.4 s, 0.8 s ... and all behind it waits; nothing is lost on a connection that lives. A dead
host gives no answer; a dead process resets its connections. A pair that is cut in either direction cannot talk at all.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from p2pdyn.constants import CONTROL_IDLE_S, CONTROL_PING_S
from p2pdyn.sim.clock import Clock
from p2pdyn.sim.sizes import ACCEPTING, KEEPALIVE, MESSAGE, OPENING, PAYLOAD, SEGMENT, message_bytes

LATENCY_S = 0.0005
"""Shortest one-way delay; the real one is up to three times as long. A LAN with a busy peer."""

RTO_S = 0.2
"""Linux's least retransmission time."""

SYN_RTO_S = 1.0
"""Linux waits this long before it repeats a SYN."""

GIVE_UP_S = 5.0
"""A connection that is stuck for longer is torn down (ZMTP heartbeat time-out), with what waited on it."""


class Host(Protocol):
    """What the network must know of a node."""

    up: bool
    reachable: bool
    life: int
    sent: Counter[str]
    """Bytes, by message kind; ``handshake`` and ``heartbeat`` besides."""
    sent_messages: int


class Cluster(Protocol):
    clock: Clock

    @property
    def nodes(self) -> Sequence[Host]: ...

    def deliver(self, to: int, message: object, reply: object | None, source: int) -> None: ...
    def link_down(self, at: int, peer: int) -> None: ...


class Cuts:
    """Which directed pairs are cut, and the loss of those that are not."""

    def __init__(self, loss: float) -> None:
        self.loss = loss
        self.any = False
        self._groups: dict[int, int] = {}
        self._one_way: set[tuple[int, int]] = set()

    def partition(self, *groups: set[int]) -> None:
        """Nodes of different groups do not hear each other; nodes in no group hear everybody."""
        self.any = True
        self._groups = {node: number for number, group in enumerate(groups) for node in group}

    def cut(self, source: int, to: int) -> None:
        self.any = True
        self._one_way.add((source, to))

    def heal(self) -> None:
        self._groups.clear()
        self._one_way.clear()
        self.any = False

    def blocked(self, source: int, to: int) -> bool:
        if not self.any:
            return False
        groups = self._groups.get(source), self._groups.get(to)
        return (source, to) in self._one_way or (None not in groups and groups[0] != groups[1])


def _account(host: Host, message: object, tries: int = 1) -> None:
    size = message_bytes(message)
    host.sent[type(message).__name__] += (size + MESSAGE + size // PAYLOAD * SEGMENT) * tries
    host.sent_messages += 1


class DatagramNetwork:
    """Lossy, unordered, connectionless."""

    def __init__(self, cluster: Cluster, rng: random.Random, loss: float) -> None:
        self._cluster = cluster
        self._rng = rng
        self.cuts = Cuts(loss)

    def send(self, source: int, to: int, message: object) -> None:
        self._transmit(source, to, message, (source, to))

    def reply(self, source: int, handle: object, message: object) -> None:
        assert isinstance(handle, tuple)
        self._transmit(source, handle[0], message, None)

    def _transmit(self, source: int, to: int, message: object, handle: object | None) -> None:
        cluster, rng = self._cluster, self._rng
        _account(cluster.nodes[source], message)
        if rng.random() < self.cuts.loss or self.cuts.blocked(source, to):
            return
        delay = LATENCY_S * (1 + 2 * rng.random())
        cluster.clock.at(cluster.clock.now + delay, cluster.deliver, to, message, handle, source)

    def crashed(self, node: int) -> None:
        """Nothing to tear down."""

    def drop(self, source: int, to: int) -> None:
        """Nothing to close."""


@dataclass(slots=True)
class _Connection:
    client: int
    server: int
    lives: tuple[int, int]
    ready: float
    opened: float
    used: float
    out_last: float = 0.0
    back_last: float = 0.0
    closed: bool = False


class TcpNetwork:
    """Ordered, reliable while it lives, late under loss."""

    def __init__(self, cluster: Cluster, rng: random.Random, loss: float) -> None:
        self._cluster = cluster
        self._rng = rng
        self.cuts = Cuts(loss)
        self._connections: dict[tuple[int, int], _Connection] = {}
        self.opened = 0

    def send(self, source: int, to: int, message: object) -> None:
        """On the source's own connection to ``to``, opened if need be."""
        connection = self._connected(source, to)
        if connection is None:
            return
        start = max(self._cluster.clock.now, connection.ready)
        arrival = self._arrival(source, to, start, connection.out_last, message)
        if arrival is None:
            self._tear_down(connection)
            return
        connection.out_last = arrival
        self._cluster.clock.at(arrival, self._arrive, connection, to, message, source)

    def reply(self, source: int, handle: object, message: object) -> None:
        """Back on the connection that the question came in on, if it still lives."""
        assert isinstance(handle, _Connection)
        if not self._alive(handle) or handle.closed or self._cut(handle.client, handle.server):
            return
        handle.used = self._cluster.clock.now
        arrival = self._arrival(source, handle.client, self._cluster.clock.now, handle.back_last, message)
        if arrival is None:
            self._tear_down(handle)
            return
        handle.back_last = arrival
        self._cluster.clock.at(arrival, self._arrive, handle, handle.client, message, source)

    def crashed(self, node: int) -> None:
        """A process ended on a host that lives: its connections are reset and their other ends know it."""
        if not self._cluster.nodes[node].reachable:
            return
        for connection in [c for c in self._connections.values() if c.server == node]:
            self._tear_down(connection)

    def drop(self, source: int, to: int) -> None:
        """The source closes its connection; what was on its way is lost."""
        if (source, to) in self._connections:
            self._close((source, to), self._cluster.clock.now)

    def open_connections(self) -> int:
        """Connections in use now; also closes the idle ones."""
        now = self._cluster.clock.now
        for key, connection in list(self._connections.items()):
            if now - connection.used > CONTROL_IDLE_S:
                self._close(key, connection.used + CONTROL_IDLE_S)
        return len(self._connections)

    def _cut(self, one: int, other: int) -> bool:
        cuts = self.cuts
        return cuts.any and (cuts.blocked(one, other) or cuts.blocked(other, one))

    def _alive(self, connection: _Connection) -> bool:
        hosts = self._cluster.nodes
        return connection.lives == (hosts[connection.client].life, hosts[connection.server].life)

    def _connected(self, client: int, server: int) -> _Connection | None:
        """The open connection, or a new one whose handshake has begun; None if there is nobody to answer."""
        now, hosts = self._cluster.clock.now, self._cluster.nodes
        key = (client, server)
        connection = self._connections.get(key)
        if connection is not None:
            if now - connection.used > CONTROL_IDLE_S:
                self._close(key, connection.used + CONTROL_IDLE_S)
            elif not self._alive(connection):
                self._close(key, now)
                if hosts[server].up and connection.lives[0] == hosts[client].life:
                    self._reset(client, server)
                    return None
            else:
                connection.used = now
                return None if self._cut(client, server) or not hosts[server].up else connection
        return self._open(key)

    def _open(self, key: tuple[int, int]) -> _Connection | None:
        client, server = key
        now, hosts = self._cluster.clock.now, self._cluster.nodes
        if self._cut(client, server) or not hosts[server].reachable:
            hosts[client].sent["handshake"] += SEGMENT
            return None
        if not hosts[server].up:
            self._reset(client, server)
            return None
        hosts[client].sent["handshake"] += OPENING
        hosts[server].sent["handshake"] += ACCEPTING
        ready = now + self._delays(2, SYN_RTO_S)[0] + self._delays(6, RTO_S)[0]
        connection = _Connection(client, server, (hosts[client].life, hosts[server].life), ready, now, now)
        self._connections[key] = connection
        self.opened += 1
        return connection

    def _delays(self, legs: int, rto: float) -> tuple[float, int]:
        """Seconds and segments that ``legs`` segments, one after the other, take."""
        draw, loss = self._rng.random, self.cuts.loss
        delay, segments = LATENCY_S * legs * (1 + 2 * draw()), legs
        for _ in range(legs):
            wait = rto
            while draw() < loss:
                delay += wait
                wait *= 2
                segments += 1
        return delay, segments

    def _arrival(self, source: int, to: int, start: float, last: float, message: object) -> float | None:
        """When it arrives, behind what was sent before; None if the connection gives up."""
        delay, segments = self._delays(1, RTO_S)
        hosts = self._cluster.nodes
        _account(hosts[source], message, segments)
        hosts[to].sent["acknowledgement"] += SEGMENT
        return None if delay > GIVE_UP_S else max(start + delay, last)

    def _arrive(self, connection: _Connection, to: int, message: object, source: int) -> None:
        if not self._alive(connection) or connection.closed or self._cut(connection.client, connection.server):
            return
        handle = connection if to == connection.server else None
        self._cluster.deliver(to, message, handle, source)

    def _reset(self, client: int, server: int) -> None:
        self._cluster.clock.at(self._cluster.clock.now + 2 * LATENCY_S, self._cluster.link_down, client, server)

    def _tear_down(self, connection: _Connection) -> None:
        key = (connection.client, connection.server)
        if self._connections.get(key) is connection:
            self._close(key, self._cluster.clock.now)
            self._reset(*key)

    def _close(self, key: tuple[int, int], when: float) -> None:
        connection = self._connections.pop(key)
        connection.closed = True
        beats = int((when - connection.opened) / CONTROL_PING_S)
        for node in key:
            self._cluster.nodes[node].sent["heartbeat"] += 2 * beats * KEEPALIVE

    def settle(self) -> None:
        """Account for the heartbeats of what is still open."""
        for key in list(self._connections):
            self._close(key, min(self._cluster.clock.now, self._connections[key].used + CONTROL_IDLE_S))
