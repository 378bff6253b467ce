"""The members a node knows, and what each is thought to be."""

from __future__ import annotations

from dataclasses import dataclass

from p2pdyn.core.types import Address, NodeId, Version


@dataclass(frozen=True, slots=True)
class Member:
    """One peer as this node sees it.

    ``state`` is alive, suspect, dead or left. ``info`` is what the peer says of itself, opaque here. ``since`` is when
    the state was entered, ``last_seen`` when the peer itself was last heard (``now`` of the core's clock, seconds).
    """

    id: NodeId
    version: Version
    address: Address
    state: str
    info: bytes
    since: float = 0.0
    last_seen: float = 0.0
