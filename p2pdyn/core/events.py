"""What happens to the membership core. Shells build these; the core never waits for one."""

from __future__ import annotations

from dataclasses import dataclass

from p2pdyn.core.types import Address, NodeId


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that ``next_deadline`` named has come. A tick too early does nothing."""


@dataclass(frozen=True, slots=True)
class Received:
    """A membership message arrived.

    ``source`` is the sender's node id from the header. ``reply`` is the shell's own handle of the connection that it
    came in on, given back in :class:`~p2pdyn.core.actions.Reply`; None when it came in on a DEALER of ours (an answer).
    """

    message: object
    reply: object | None
    source: str


@dataclass(frozen=True, slots=True)
class Introduced:
    """mDNS, a seed or a user named an address where a peer may be. It is never forgotten, and never proof of life."""

    address: Address


@dataclass(frozen=True, slots=True)
class Announce:
    """What this node says of itself changed: bump the incarnation and tell everybody at once."""

    info: bytes


@dataclass(frozen=True, slots=True)
class ProbeNow:
    """Somebody saw this node fail (a broken request stream): probe it before the others."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class LinkDown:
    """A connection to this address broke, was refused or failed its handshake; not one that we closed ourselves."""

    address: Address


@dataclass(frozen=True, slots=True)
class Leave:
    """This node goes away on purpose. It tells the others and answers probes, but probes nobody any more."""


Event = Tick | Received | Introduced | Announce | ProbeNow | LinkDown | Leave
