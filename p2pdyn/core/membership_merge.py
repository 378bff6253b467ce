"""What a node does with each statement about a member: the table of docs/design/membership.md, "States of a member"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from p2pdyn.core.actions import Alarm
from p2pdyn.core.identity import above, address_of, version_of
from p2pdyn.core.isolation import Isolation
from p2pdyn.core.membership_claims import Claims
from p2pdyn.core.membership_context import Context
from p2pdyn.core.membership_gossip import Spreader
from p2pdyn.core.membership_roster import ALIVE, STATES, Member, rumour, whole_record
from p2pdyn.core.suspicion import Suspicion
from p2pdyn.core.types import DEAD, LEFT, SUSPECT, NodeId, Version
from p2pdyn.wire.control import ALIVE_CODE, SUSPECT_CODE, Gossip, Ping, Record

SUSPECTED = "suspected"
LAST_WORD = "last-word"
ISOLATED_TEXT = "most peers stopped answering at once: this node's own network is the likelier cause; check its link"


class Merger:
    """Applies records to the roster. Every change is told on; nothing else is."""

    def __init__(self, context: Context, spreader: Spreader, isolation: Isolation) -> None:
        self._context = context
        self._spreader = spreader
        self._isolation = isolation
        self.claims = Claims(context, lambda record: self._alive(record, checked=True))
        self.suspicions: dict[NodeId, Suspicion] = {}
        self._started: float | None = None
        self.leaving = False

    def apply_all(self, records: Iterable[Record]) -> None:
        """News from gossip."""
        for record in records:
            self.apply(record)

    def apply(self, record: Record, whole: bool = False, direct: bool = False) -> None:
        """Merge one record. ``whole``: from a Sync, so it has address and info in every state, and is another's view;
        ``direct``: from the member itself."""
        if self._started is None:
            self._started = self._context.running
        if record.id == self._context.roster.id:
            self._about_us(record, direct)
        elif record.state == ALIVE_CODE:
            self._alive(record, direct=direct)
        else:
            self._bad_news(record, whole)

    def _bad_news(self, record: Record, whole: bool) -> None:
        """Suspect, dead or left."""
        state, version = STATES[record.state], version_of(record)
        member = self._context.roster.members.get(NodeId(record.id))
        if whole and (member is None or version.epoch > member.version.epoch):
            if state != SUSPECT:
                self._bury(record, state, member)
                return
            self._alive(record)
            member = self._context.roster.members.get(NodeId(record.id))
        if member is None or version < member.version or version.epoch != member.version.epoch:
            return
        if state == LEFT:
            self._down(member, LEFT, version, "")
        elif state == SUSPECT or (whole and member.live):
            self._suspect(member, version, record.origin)
        else:
            self._down(member, DEAD, version, record.origin)

    def _alive(self, record: Record, checked: bool = False, direct: bool = False) -> None:
        """A live member, new or news of a known one. The record of a suspect in a Sync passes here first, too.

        An old statement is ignored, unless the node makes it itself: then it may be a second one with this id.
        """
        context = self._context
        member = context.roster.members.get(NodeId(record.id))
        version, address = version_of(record), address_of(record)
        old = member is not None and version <= member.version
        if (old and not direct) or (not checked and self.claims.held(record, member)) or old:
            return
        if not self._address_is_free(record):
            return
        node = NodeId(record.id)
        since = member.since if member is not None and member.state == ALIVE else context.now
        seen = member.last_seen if member is not None else context.now
        context.put(Member(node, version, address, ALIVE, record.info, since, seen))
        self._end_suspicion(node)
        self._spreader.tell(replace(record, state=ALIVE_CODE, origin="", age=0))

    def _address_is_free(self, record: Record) -> bool:
        """One address, one live node: the one with the higher epoch started later, so the other is gone."""
        holder = self._context.roster.holder(address_of(record))
        if holder is None or holder.id == record.id:
            return True
        if record.epoch <= holder.version.epoch:
            if holder.id == self._context.roster.id and record.epoch < holder.version.epoch:
                self._bury(record, DEAD, None)
            return False
        if holder.id == self._context.roster.id:
            text = (
                f"peer {record.id} says that it listens at this node's own address {holder.address}: check its --listen"
            )
            self._context.actions.append(Alarm("address-conflict", text, self._context.config.reject_s))
            return False
        self._down(holder, DEAD, holder.version, record.id)
        return True

    def _bury(self, record: Record, state: str, member: Member | None) -> None:
        """Learn of a life that ended before we knew it."""
        context = self._context
        if record.age >= context.config.left_forget_s and state == LEFT:
            return
        if member is not None and member.live and self.claims.held(record, member):
            return
        since = context.now - record.age
        node = NodeId(record.id)
        self._end_suspicion(node)
        context.put(Member(node, version_of(record), address_of(record), state, record.info, since, since))
        self._limit_the_dead()

    def _suspect(self, member: Member, version: Version, origin: str) -> None:
        if not member.live:
            return
        suspicion = self.suspicions.get(member.id)
        if suspicion is None:
            self._begin_suspicion(replace(member, version=version), origin)
            return
        fresh = suspicion.confirm(origin)
        if version > member.version:
            member = replace(member, version=version)
            self._context.put(member)
            fresh = True
        if fresh:
            self._time(member.id, suspicion)
            self._spreader.tell(rumour(member, SUSPECT, origin))

    def _begin_suspicion(self, member: Member, origin: str) -> None:
        context, config = self._context, self._context.config
        nodes = context.roster.nodes
        shortest = config.suspicion_min(nodes)
        needed = max(0, min(config.confirmations, nodes - 2))
        suspicion = Suspicion(origin, needed, shortest, shortest * config.suspicion_max, context.running)
        self.suspicions[member.id] = suspicion
        self._time(member.id, suspicion)
        context.put(replace(member, state=SUSPECT, since=context.now))
        self._spreader.tell(rumour(member, SUSPECT, origin), own=origin == context.roster.id)

    def accuse(self, member: Member) -> None:
        """Our own probe failed. The suspect is told directly, so that it can refute without waiting for gossip."""
        context = self._context
        suspicion = self.suspicions.get(member.id)
        if suspicion is not None and suspicion.accused_by(context.roster.id):
            return
        self._suspect(member, member.version, context.roster.id)
        context.send(member.address, Gossip((rumour(member, SUSPECT, context.roster.id),)))

    def _time(self, node: NodeId, suspicion: Suspicion) -> None:
        self._context.arm_at(suspicion.deadline, SUSPECTED, node)
        self._context.arm_at(suspicion.deadline - self._context.config.last_word_s, LAST_WORD, node)

    def last_word(self, subject: object) -> None:
        """The refutation may have missed us alone: ask the suspect itself, twice, before its time is up."""
        context = self._context
        member = context.roster.members.get(subject)  # type: ignore[call-overload]
        suspicion = self.suspicions.get(subject)  # type: ignore[call-overload]
        if member is None or suspicion is None:
            return
        context.send(member.address, Ping(context.number(), member.id, (rumour(member, SUSPECT, context.roster.id),)))
        half = context.config.last_word_s / 2
        if suspicion.deadline - context.running > half:
            context.arm(half, LAST_WORD, subject)

    def suspicion_over(self, subject: object) -> None:
        """The time to refute is up: dead, unless we have reason to doubt ourselves."""
        context = self._context
        member = context.roster.members.get(subject)  # type: ignore[call-overload]
        suspicion = self.suspicions.get(subject)  # type: ignore[call-overload]
        if member is None or suspicion is None:
            return
        was_sure = self._isolation.since is None
        wait = self._isolation.held_for(context.running)
        if was_sure and self._isolation.since is not None:
            context.awareness.worst()
            context.actions.append(Alarm("isolated", ISOLATED_TEXT, context.config.reject_s))
        if wait > 0:
            context.arm(wait, SUSPECTED, subject)
            return
        accused_by_us = suspicion.accused_by(context.roster.id)
        self._down(member, DEAD, member.version, context.roster.id)
        if accused_by_us:
            context.send(member.address, Gossip((rumour(member, DEAD, context.roster.id),)))

    def reassured(self) -> None:
        """Peers answer again: what was held against them begins afresh."""
        context = self._context
        context.actions.append(Alarm("isolated", "", 0.0))
        for node, suspicion in self.suspicions.items():
            suspicion.restart(context.running)
            self._time(node, suspicion)

    def end_life(self, member: Member, by: NodeId) -> None:
        """Direct evidence that this life of the member is over: another id answers at its address."""
        if member.live:
            self._down(member, DEAD, member.version, by)

    def _down(self, member: Member, state: str, version: Version, origin: str) -> None:
        """Dead or left. A dead one may still turn out to have left, but a left one is not dead."""
        if member.state == LEFT or (member.state == DEAD and state == DEAD and version <= member.version):
            return
        context = self._context
        since = member.since if not member.live else context.now
        member = replace(member, version=version, state=state, since=since)
        self._end_suspicion(member.id)
        context.put(member)
        self._spreader.tell(rumour(member, state, origin), own=origin == context.roster.id)
        self._limit_the_dead()

    def _end_suspicion(self, node: NodeId) -> None:
        if self.suspicions.pop(node, None) is not None:
            self._context.timers.cancel(SUSPECTED, node)
            self._context.timers.cancel(LAST_WORD, node)

    def _limit_the_dead(self) -> None:
        roster = self._context.roster
        while len(roster.down) > self._context.config.dead_max:
            roster.forget(next(iter(roster.down)))

    def forget_the_left(self) -> None:
        """Those that left long ago need no record any more."""
        context = self._context
        for node in list(context.roster.down):
            member = context.roster.members[node]
            if member.state == LEFT and context.now - member.since >= context.config.left_forget_s:
                context.roster.forget(node)

    def _about_us(self, record: Record, direct: bool) -> None:
        """Somebody speaks of this node, or of its id."""
        context, local = self._context, self._context.roster.local
        version = version_of(record)
        elsewhere = bool(record.host) and address_of(record) != local.address
        if self.leaving or (version < local.version and not (direct and elsewhere)):
            return
        if record.state in (ALIVE_CODE, SUSPECT_CODE) and elsewhere and version.epoch != local.version.epoch:
            ran = context.running - (self._started or 0.0)
            if ran >= context.config.claim_age_s and not self.claims.remind(record):
                self.claims.refuse(record, local.address)
            return
        if record.state == ALIVE_CODE and version == local.version:
            return
        if record.state != ALIVE_CODE and version.epoch == local.version.epoch:
            context.awareness.add(1)
        self.declare(above(local.version, version), local.info)

    def declare(self, version: Version, info: bytes, state: str = ALIVE) -> None:
        """A new statement about ourselves, told to all."""
        context = self._context
        local = replace(context.roster.local, version=version, info=info, state=state, since=context.now)
        context.put(local)
        if state == LEFT:
            self._spreader.tell(rumour(local, LEFT, local.id), own=True)
        else:
            self._spreader.tell(whole_record(local, context.now), own=True)
