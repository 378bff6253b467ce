"""Duplicate ids: the older holder keeps the id if it still answers a direct probe.

A claim is a record of a known live id at another address and another epoch. It is held back until the known holder
answered (the newcomer must stop) or did not (the newcomer is the same node, moved).
"""

from __future__ import annotations

from collections.abc import Callable

from p2pdyn.core.actions import Alarm, Fatal
from p2pdyn.core.identity import Claim, address_of, conflict, conflict_text
from p2pdyn.core.membership_context import Context
from p2pdyn.core.membership_roster import Member
from p2pdyn.core.types import Address, NodeId
from p2pdyn.wire.control import Ack, Conflict, Ping, Record

CLAIM = "claim"
CLAIM_RETRY = "claim-retry"


class Claims:
    def __init__(self, context: Context, accept: Callable[[Record], None]) -> None:
        self._context = context
        self._accept = accept
        self._open: dict[NodeId, Claim] = {}
        self._refused: dict[tuple[str, int], tuple[float, Conflict]] = {}
        self._failed = False

    def failed(self) -> bool:
        """Whether this node lost its id and must stop."""
        return self._failed

    def held(self, record: Record, holder: Member | None) -> bool:
        """Whether this live record must wait or was refused. ``holder`` is the member of its id, if known."""
        node, address = NodeId(record.id), address_of(record)
        if self._still_refused(record):
            return True
        claim = self._open.get(node)
        if claim is not None:
            if record.epoch == claim.record.epoch:
                self._open[node] = Claim(record, claim.holder, claim.holder_epoch, claim.seq)
            return True
        if holder is None or not holder.live or holder.address == address or holder.version.epoch == record.epoch:
            return False
        claim = Claim(record, holder.address, holder.version.epoch, self._context.number())
        self._open[node] = claim
        self._context.arm(self._context.config.claim_s, CLAIM, node)
        self.retry(node)
        return True

    def retry(self, subject: object) -> None:
        """Ask the holder; again each retry interval, as any probe."""
        claim = self._open.get(subject)  # type: ignore[call-overload]
        if claim is not None:
            self._context.send(claim.holder, Ping(claim.seq, claim.record.id, ()))
            self._context.arm(self._context.config.indirect_small_s, CLAIM_RETRY, subject)

    def answered(self, ack: Ack) -> bool:
        """Whether the Ack belonged to a claim: then it is decided."""
        claim = next((claim for claim in self._open.values() if claim.seq == ack.seq), None)
        if claim is None:
            return False
        if (ack.node, ack.epoch) != (claim.record.id, claim.holder_epoch):
            self.expired(NodeId(claim.record.id))
            return True
        del self._open[NodeId(claim.record.id)]
        self.refuse(claim.record, claim.holder)
        return True

    def expired(self, subject: object) -> None:
        """The holder did not answer: the newcomer has the id."""
        claim = self._open.pop(subject, None)  # type: ignore[call-overload]
        if claim is not None:
            self._context.timers.cancel(CLAIM, subject)
            self._accept(claim.record)

    def link_down(self, address: Address) -> None:
        for node in [node for node, claim in self._open.items() if claim.holder == address]:
            self.expired(node)

    def refuse(self, newcomer: Record, keeper: Address) -> None:
        """Tell both, and remember."""
        context, node = self._context, NodeId(newcomer.id)
        message = conflict(node, keeper, newcomer)
        self._refused[newcomer.id, newcomer.epoch] = (context.now + context.config.reject_s, message)
        for address in {keeper, address_of(newcomer)} - {context.roster.local.address}:
            context.send(address, message)
        context.actions.append(Alarm("duplicate-id", conflict_text(message), context.config.reject_s))

    def told(self, message: Conflict) -> None:
        """Somebody found us in a conflict: as the newcomer we stop, as the keeper we show it."""
        context, local = self._context, self._context.roster.local
        if message.node != local.id:
            return
        text = conflict_text(message)
        context.actions.append(Alarm("duplicate-id", text, context.config.reject_s))
        newcomer = Address(message.newcomer_host, message.newcomer_port)
        if newcomer == local.address and message.newcomer_epoch == local.version.epoch:
            self._failed = True
            context.actions.append(Fatal(text))

    def _still_refused(self, record: Record) -> bool:
        entry = self._refused.get((record.id, record.epoch))
        if entry is None:
            return False
        until, message = entry
        if self._context.now >= until:
            del self._refused[record.id, record.epoch]
            return False
        newcomer = Address(message.newcomer_host, message.newcomer_port)
        return address_of(record) == newcomer

    def remind(self, record: Record) -> bool:
        """Whether this was refused before; then repeat it, in case the newcomer did not hear."""
        entry = self._refused.get((record.id, record.epoch))
        if entry is None or not self._still_refused(record):
            return False
        self._context.send(address_of(record), entry[1])
        return True
