"""Who knocks at a bound socket and does not get in: counted, named, and bounded in number.

libzmq's events of failed handshakes name no peer; the accept event names a descriptor, and that tells the address.
"""

from __future__ import annotations

import asyncio
import os
import socket as bsd
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import zmq

from p2pdyn.net.complaints import Complaints
from p2pdyn.net.monitor import HANDSHAKE_S, MISMATCH, Monitor

MAX_NEW, MAX_NEW_ALL = 256, 2048
"""Connections younger than HANDSHAKE_S at one bound socket: of one host, and in all. A peer has one to each socket, so
the first is a host with 256 peers that all start within 5 s."""

_DOOR_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
_CRYPTOGRAPHIC = int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC)


@dataclass(frozen=True, slots=True, eq=False)
class _Visitor:
    host: str
    since: float
    """When it was accepted, on the loop's clock."""
    before: int
    """Handshakes that had succeeded by then."""


class Doorman:
    """Counts the handshakes that fail at a bound socket, by cause, and names who it was; bounds how many are under way.

    libzmq gives a visitor HANDSHAKE_S and some 4 kB. Beyond MAX_NEW of one host, or MAX_NEW_ALL, a newcomer is hung up
    on at once, so that strangers take neither the descriptors nor, from one host, the members' way in.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes], complaints: Complaints) -> None:
        self.ports: frozenset[int] = frozenset()
        """Bound."""
        self._loop = loop
        self._complaints = complaints
        self._visitors: dict[int, _Visitor] = {}
        """By descriptor, members too."""
        self._new: dict[_Visitor, None] = {}
        """Accepted within HANDSHAKE_S and still there, the oldest first."""
        self._new_from: Counter[str] = Counter()
        self._succeeded = 0
        self._failure: tuple[int, int] | None = None
        self._monitor = Monitor(loop, socket, _DOOR_EVENTS, self._event)
        self.close = self._monitor.close

    def _event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._accepted(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._succeeded += 1
        elif event == zmq.EVENT_DISCONNECTED:
            # libzmq reports a failure and then, in the same breath, the descriptor that it closed.
            failure, self._failure = self._failure, None
            visitor = self._visitors.pop(value, None)
            if visitor is None:
                return  # hung up on
            self._grown(visitor)
            if failure is not None:
                self._turned_away(visitor.host, *failure)
            elif visitor.before == self._succeeded:
                # No handshake succeeded while it was here, and libzmq does not say why this one did not.
                self._strange(visitor.host)
        else:
            self._failure = (event, value)

    def _accepted(self, descriptor: int) -> None:
        now = self._loop.time()
        while self._new and (oldest := next(iter(self._new))).since < now - HANDSHAKE_S:
            self._grown(oldest)
        visitor = _Visitor(_peer_of(descriptor), now, self._succeeded)
        if self._new_from[visitor.host] >= MAX_NEW or len(self._new) >= MAX_NEW_ALL:
            text = f"hung up on {visitor.host}: too many connections at once that are not through their handshake"
            self._complaints.add("crowded", visitor.host, text)
            _hang_up(descriptor, self.ports)
            return
        self._visitors[descriptor] = visitor
        self._new[visitor] = None
        self._new_from[visitor.host] += 1

    def _grown(self, visitor: _Visitor) -> None:
        if visitor in self._new:
            del self._new[visitor]
            self._new_from[visitor.host] -= 1
            if not self._new_from[visitor.host]:
                del self._new_from[visitor.host]

    def _turned_away(self, visitor: str, event: int, value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            # It hung up, or said nothing: a scan, a peer that gave up waiting, one that found our key to be another.
            self._complaints.counts["abandoned-handshake"] += 1
        elif value == _CRYPTOGRAPHIC:
            self._complaints.add("refused-key", visitor, f"turned away {visitor}: it has another cluster key")
        elif value == MISMATCH:
            text = f"turned away {visitor}: one of the two has a cluster key and the other none"
            self._complaints.add("refused-key", visitor, text)
        else:
            self._strange(visitor)

    def _strange(self, visitor: str) -> None:
        text = f"turned away {visitor}: it does not speak as a p2pdyn peer does"
        self._complaints.add("bad-handshake", visitor, text)


def _peer_of(descriptor: int) -> str:
    """The host behind a descriptor of libzmq's, closed or reused by now perhaps: good for a log line only."""
    with suppress(OSError), _copy(descriptor) as peer:
        name = peer.getpeername()
        return str(name[0]) if name else "somebody"
    return "somebody"


def _hang_up(descriptor: int, ports: frozenset[int]) -> None:
    """End the connection, if the descriptor is still one that was accepted at these ports; libzmq closes it."""
    with suppress(OSError), _copy(descriptor) as peer:
        if peer.getsockname()[1] in ports:
            peer.shutdown(bsd.SHUT_RDWR)


def _copy(descriptor: int) -> bsd.socket:
    """Raises OSError where it is no socket any more."""
    copy = os.dup(descriptor)
    try:
        return bsd.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
