"""Who is who: boot epochs, and which of two live peers with one id keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from p2pdyn.core.types import Address, NodeId, Version
from p2pdyn.wire.control import Conflict, Record


def next_epoch(persisted: int | None, wall_ms: int) -> int:
    """The epoch of this boot: above the last one even if the clock went back, and above it if the disk was lost."""
    return max((persisted or 0) + 1, wall_ms)


def above(mine: Version, seen: Version) -> Version:
    """The least version of ours that beats ``seen``: a new incarnation, or an epoch above that of another life."""
    if seen.epoch > mine.epoch:
        return Version(seen.epoch + 1, 0)
    return Version(mine.epoch, max(mine.incarnation, seen.incarnation) + 1)


def version_of(record: Record) -> Version:
    return Version(record.epoch, record.incarnation)


def address_of(record: Record) -> Address:
    return Address(record.host, record.port)


@dataclass(frozen=True, slots=True)
class Claim:
    """``record`` claims an id whose known holder lives at another address; ``seq`` numbers the probe that decides."""

    record: Record
    holder: Address
    holder_epoch: int
    seq: int


def conflict(node: NodeId, keeper: Address, newcomer: Record) -> Conflict:
    return Conflict(node, keeper.host, keeper.port, newcomer.host, newcomer.port, newcomer.epoch)


def conflict_text(message: Conflict) -> str:
    """One sentence for both sides: what is wrong, where, and the mend."""
    keeper = Address(message.keeper_host, message.keeper_port)
    newcomer = Address(message.newcomer_host, message.newcomer_port)
    return (
        f"node id {message.node} is used by two live peers, {keeper} (keeps it) and {newcomer}: "
        f"start the one at {newcomer} with its own --data-dir"
    )
