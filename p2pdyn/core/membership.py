"""SWIM membership with Lifeguard, digest synchronisation and healing, without IO (docs/design/membership.md).

The rules:

1. Records of one id are ordered by (epoch, incarnation), then alive < suspect < dead < left. The higher one wins.
2. Only the node itself raises its version. Its own record is never dead while it runs: it refutes.
3. mDNS and seeds introduce; only probes, and a member's own word, remove.
4. Introduced and dead addresses are announced to for ever, one each ``heal_s``, so partitions heal.
5. Time does not pass while the process is paused: nothing is concluded from a deadline that was noticed late.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from p2pdyn.core.actions import Action
from p2pdyn.core.events import Announce, Event, Introduced, Leave, LinkDown, ProbeNow, Received
from p2pdyn.core.identity import above
from p2pdyn.core.isolation import Isolation
from p2pdyn.core.membership_claims import CLAIM, CLAIM_RETRY
from p2pdyn.core.membership_config import MembershipConfig
from p2pdyn.core.membership_context import Context
from p2pdyn.core.membership_gossip import ROUND, Spreader
from p2pdyn.core.membership_merge import LAST_WORD, SUSPECTED, Merger
from p2pdyn.core.membership_probe import AGAIN, FAIL, INDIRECT, PROBE, RELAY, REPROBE, RETRY, Prober
from p2pdyn.core.membership_roster import ALIVE, Member
from p2pdyn.core.membership_sync import HEAL, JOIN, SYNC, Syncer
from p2pdyn.core.timers import ROUNDING_S
from p2pdyn.core.types import LEFT, NodeId, Version
from p2pdyn.wire.control import Ack, Conflict, Gossip, Nack, Ping, PingReq, Sync, SyncPush, SyncReply

__all__ = ["Member", "Membership", "MembershipConfig"]


class Membership:
    """One node's view of the cluster. All times are seconds; ``now`` is any monotonic clock."""

    def __init__(self, local: Member, config: MembershipConfig, rng: random.Random) -> None:
        self._context = context = Context(local, config, rng)
        self._isolation = Isolation(config.isolation_window, config.isolation_least, config.isolation_hold_s)
        self._spreader = Spreader(context)
        self._merger = Merger(context, self._spreader, self._isolation)
        self._prober = Prober(context, self._spreader, self._merger, self._isolation)
        self._syncer = Syncer(context, self._spreader, self._merger)
        self._paused = 0.0
        self._started = False
        self._on_timer: dict[str, Callable[[object], None]] = {
            PROBE: self._prober.turn,
            RETRY: self._prober.retry,
            INDIRECT: self._prober.indirect,
            AGAIN: self._prober.again,
            FAIL: self._prober.fail,
            RELAY: self._prober.relay_over,
            REPROBE: self._prober.reprobe,
            SUSPECTED: self._merger.suspicion_over,
            LAST_WORD: self._merger.last_word,
            CLAIM: self._merger.claims.expired,
            CLAIM_RETRY: self._merger.claims.retry,
            ROUND: self._spreader.round,
            SYNC: self._syncer.periodic,
            HEAL: self._syncer.heal,
            JOIN: self._syncer.join,
        }

        self._on_message: dict[type, Callable[[Any, Received], None]] = {
            Ping: self._on_ping,
            Ack: self._on_ack,
            Gossip: self._on_gossip,
            PingReq: self._on_ping_request,
            Nack: lambda nack, event: self._prober.on_nack(nack),
            Sync: self._on_sync,
            SyncReply: lambda reply, event: self._syncer.on_reply(reply),
            SyncPush: lambda push, event: self._syncer.on_push(push, event.source),
            Conflict: lambda conflict, event: self._merger.claims.told(conflict),
        }

    @property
    def local(self) -> Member:
        """This node's own record. Its epoch rises above the boot epoch if a newer life of the same id was seen."""
        return self._context.roster.local

    @property
    def members(self) -> Mapping[NodeId, Member]:
        """All known members, this node included."""
        return MappingProxyType(self._context.roster.members)

    @property
    def health(self) -> int:
        """Lifeguard's score: 0 is healthy."""
        return self._context.awareness.score

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at ``now`` and say what to do, in order. Due timers run first."""
        context = self._context
        if self._merger.claims.failed():
            return []
        context.actions = []
        if self._advance(now):
            for kind, subject in context.timers.due(context.running):
                self._on_timer[kind](subject)
        if isinstance(event, Received):
            self._receive(event)
        else:
            self._local_event(event)
        if self._merger.claims.failed():
            context.timers.clear()
        return context.actions

    def next_deadline(self) -> float | None:
        """When the core wants a Tick at the latest; None: never. Valid until the next ``handle``."""
        at = self._context.timers.next()
        return None if at is None else at + self._paused

    def _advance(self, now: float) -> bool:
        """Set both clocks; whether a timer may be due. Time between a deadline and a call that comes much too late was
        no running time."""
        context = self._context
        if not self._started:
            self._started = True
            context.now, context.running = now, now
            self._prober.start()
            self._syncer.start()
        at = context.timers.next()
        late = now - self._paused - at if at is not None else -1.0
        if late > context.config.pause_s:
            self._paused += late
            context.awareness.add(1)
        context.now = now
        context.running = now - self._paused
        return late > -ROUNDING_S

    def _receive(self, event: Received) -> None:
        message, context = event.message, self._context
        if event.source != context.roster.id:
            context.roster.seen(event.source, context.now)
            if self._isolation.since is not None:
                self._prober.note_heard(event.source)
        on_message = self._on_message.get(type(message))
        if on_message is not None:
            on_message(message, event)

    def _on_gossip(self, message: Gossip, event: Received) -> None:
        self._merger.apply_all(message.updates)

    def _on_ping(self, ping: Ping, event: Received) -> None:
        self._merger.apply_all(ping.updates)
        if event.reply is not None:
            self._prober.on_ping(ping, event.reply, event.source)

    def _on_ping_request(self, request: PingReq, event: Received) -> None:
        self._merger.apply_all(request.updates)
        if event.reply is not None:
            self._prober.on_ping_request(request, event.reply)

    def _on_ack(self, ack: Ack, event: Received) -> None:
        self._merger.apply_all(ack.updates)
        if self._merger.claims.answered(ack):
            return
        other = self._prober.on_ack(ack)
        if other is not None:
            self._syncer.ask(self._context.roster.members[other].address)

    def _on_sync(self, sync: Sync, event: Received) -> None:
        if event.reply is not None:
            self._syncer.on_sync(sync, event.reply)

    def _local_event(self, event: Event) -> None:
        context, local = self._context, self.local
        if isinstance(event, Introduced):
            self._syncer.introduce(event.address)
        elif isinstance(event, Announce) and local.state == ALIVE:
            self._merger.declare(above(local.version, local.version), event.info)
        elif isinstance(event, ProbeNow):
            self._prober.now(event.node)
        elif isinstance(event, LinkDown):
            self._merger.claims.link_down(event.address)
            holder = context.roster.holder(event.address)
            if holder is not None:
                self._prober.now(holder.id)
        elif isinstance(event, Leave) and local.state == ALIVE:
            self._leave()

    def _leave(self) -> None:
        """Say so, several times over if the cluster is large, and stop asking others."""
        context, local = self._context, self.local
        for kind in (PROBE, SYNC, HEAL):
            context.timers.cancel(kind)
        self._merger.leaving = True
        self._merger.declare(Version(local.version.epoch, local.version.incarnation + 1), local.info, LEFT)

    def preload(self, members: Iterable[Member]) -> None:
        """Start with a known view instead of joining; before the first event."""
        for member in members:
            if member.id != self.local.id:
                self._context.roster.put(member)

    def snapshot(self) -> dict[str, object]:
        """What is worth seeing of the state besides the members."""
        return {
            "nodes": self._context.roster.nodes,
            "suspects": sorted(self._merger.suspicions),
            "health": self.health,
            "isolated": self._isolation.since is not None,
            "news": len(self._spreader.news),
            "paused_s": round(self._paused, 3),
        }

    def check(self) -> None:
        """Raise AssertionError if an invariant of the state is broken; for tests."""
        roster = self._context.roster
        local = roster.local
        assert local.state == (LEFT if self._merger.leaving else ALIVE)
        others = {node: member for node, member in roster.members.items() if node != local.id}
        assert {node for node, member in others.items() if member.live} == set(roster.live)
        assert len(roster.live) == len(set(roster.live))
        assert {node for node, member in others.items() if not member.live} == set(roster.down)
        suspects = {node for node, member in others.items() if member.state == "suspect"}
        assert suspects == set(self._merger.suspicions)
        assert all(self._context.timers.armed(SUSPECTED, node) for node in suspects)
