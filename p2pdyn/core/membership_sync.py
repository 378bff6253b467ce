"""Comparing views: the join, the anti-entropy and the healing of partitions are one exchange.

asker                                  answerer
Sync(own record, digests)      ->
                               <-      SyncReply(records where digests differ, until full)
SyncPush(what beats those)     ->
Sync(...) again if there was more
"""

from __future__ import annotations

from p2pdyn.core.actions import Reply
from p2pdyn.core.broadcast import record_size
from p2pdyn.core.identity import address_of, version_of
from p2pdyn.core.membership_context import Context
from p2pdyn.core.membership_gossip import Spreader
from p2pdyn.core.membership_merge import Merger
from p2pdyn.core.membership_roster import CODES, Member, bucket_of, whole_record
from p2pdyn.core.types import DEAD, LEFT, Address, NodeId
from p2pdyn.wire.control import BUCKETS, MAX_UPDATES, Gossip, Record, Sync, SyncPush, SyncReply

SYNC = "sync"
HEAL = "heal"
JOIN = "join"
MAX_OPEN = 64


class Syncer:
    def __init__(self, context: Context, spreader: Spreader, merger: Merger) -> None:
        self._context = context
        self._spreader = spreader
        self._merger = merger
        self._introduced: dict[Address, float] = {}
        """Address -> delay before its next early repetition; never forgotten while there is room."""
        self._open: dict[int, tuple[Address, int]] = {}
        """Sync number -> to whom, and which page of the conversation it asks for."""
        self._heal_queue: list[Address] = []
        self._sync_s = context.config.sync_first_s
        self._started = 0.0
        self._met = False
        self._refilled = 0.0
        self._allowance = float(context.config.answer_first)

    def start(self) -> None:
        self._started = self._context.running
        self._context.arm(self._sync_s, SYNC)
        self._context.arm(self._context.rng.random() * self._context.config.heal_s, HEAL)

    def introduce(self, address: Address) -> None:
        """Sync with whoever listens there, soon again if nobody answers, then in turn with the dead, for ever."""
        context = self._context
        if address == context.roster.local.address or address in self._introduced:
            return
        if len(self._introduced) >= context.config.introduced_max:
            del self._introduced[next(iter(self._introduced))]
        self._introduced[address] = context.config.join_s
        self.join(address)

    def join(self, subject: object) -> None:
        assert isinstance(subject, Address)
        context = self._context
        delay = self._introduced.get(subject)
        if delay is None or context.roster.holder(subject) is not None:
            return
        self.ask(subject)
        if delay < context.config.heal_s:
            self._introduced[subject] = delay * 2
            context.arm(delay, JOIN, subject)

    def ask(self, address: Address, pages: int = 1) -> None:
        roster = self._context.roster
        seq = self._context.number()
        while len(self._open) >= MAX_OPEN:
            del self._open[next(iter(self._open))]
        self._open[seq] = (address, pages)
        self._context.send(address, Sync(seq, whole_record(roster.local, self._context.now), roster.digests()))

    def periodic(self, _: object = None) -> None:
        context = self._context
        neighbours = self._spreader.neighbours()
        if neighbours:
            self.ask(context.roster.members[context.rng.choice(neighbours)].address)
        self._merger.forget_the_left()
        self._sync_s = min(self._sync_s * 2, context.config.sync_s)
        context.arm(self._sync_s * (0.5 + context.rng.random()), SYNC)

    def heal(self, _: object = None) -> None:
        """One address that should perhaps be a live member."""
        context, roster = self._context, self._context.roster
        if not self._heal_queue:
            dead = {m.address for node in roster.down if (m := roster.members[node]).state == DEAD}
            self._heal_queue = [a for a in dead.union(self._introduced) if a != roster.local.address]
            self._heal_queue.sort()
            context.rng.shuffle(self._heal_queue)
        while self._heal_queue:
            address = self._heal_queue.pop()
            if roster.holder(address) is None:
                self.ask(address)
                break
        interval = context.config.heal_interval(roster.nodes)
        context.arm(interval * (0.5 + context.rng.random()), HEAL)

    def on_sync(self, sync: Sync, to: object) -> None:
        """Answer with our records where the views differ; the asker's own record is taken first."""
        context, roster = self._context, self._context.roster
        if sync.record.id != roster.id:
            self._merger.claims.remind(sync.record)
        elif (sync.record.host, sync.record.port) == (roster.local.address.host, roster.local.address.port):
            return
        self._merger.apply(sync.record, whole=True, direct=True)
        differ = _differing(roster.digests(), sync.digests)
        if not self._may_answer():
            differ = [bucket_of(roster.id)] if bucket_of(roster.id) in differ else []
        covered, room = 0, context.config.sync_bytes
        records: list[Record] = []
        by_bucket = self._by_bucket(differ)
        for bucket in context.rng.sample(differ, len(differ)):
            page = [whole_record(member, context.now) for member in by_bucket[bucket]]
            size = sum(map(record_size, page))
            if covered and (size > room or len(records) + len(page) > MAX_UPDATES):
                break
            records += page
            covered |= 1 << bucket
            room -= size
        kept = tuple(_fitting(records, context.config.sync_bytes))
        self._allowance -= sum(map(record_size, kept))
        more = covered.bit_count() < len(differ)
        context.actions.append(Reply(to, SyncReply(sync.seq, covered, more, kept)))

    def _may_answer(self) -> bool:
        """A token bucket of bytes, refilled as time passes."""
        config, now = self._context.config, self._context.running
        self._allowance += (now - self._refilled) * config.answer_rate
        self._allowance = min(self._allowance, config.answer_burst)
        self._refilled = now
        return self._allowance > 0

    def _by_bucket(self, buckets: list[int]) -> dict[int, list[Member]]:
        chosen: dict[int, list[Member]] = {bucket: [] for bucket in buckets}
        if chosen:
            for node, member in self._context.roster.members.items():
                if (members := chosen.get(bucket_of(node))) is not None:
                    members.append(member)
        return chosen

    def on_reply(self, reply: SyncReply) -> None:
        """Merge, then push what we know better; a refutation of ours made just now is part of it."""
        address, pages = self._open.pop(reply.seq, (None, 0))
        if address is None:
            return
        self._learn(reply.records)
        self._meet(reply.records)
        theirs = {record.id: (version_of(record), record.state) for record in reply.records}
        better: list[Record] = []
        for members in self._by_bucket([b for b in range(BUCKETS) if reply.covered >> b & 1]).values():
            for member in members:
                their = theirs.get(member.id)
                if their is None or (member.version, CODES[member.state]) > their:
                    better.append(whole_record(member, self._context.now))
        if better:
            self._context.send(address, SyncPush(tuple(_fitting(better, self._context.config.sync_bytes))))
        if reply.more and reply.covered and pages < self._context.config.sync_pages:
            self.ask(address, pages + 1)

    def _meet(self, records: tuple[Record, ...]) -> None:
        """The first answer tells a newcomer whom there is; a few it tells of itself at once, as any news of its own,
        unless somebody else has its id: then the answerer sees to that."""
        context, local = self._context, self._context.roster.local
        if self._met or not context.roster.live:
            return
        self._met = True
        taken = any(record.id == local.id and address_of(record) != local.address for record in records)
        if context.roster.nodes <= context.config.small and not taken:
            self._spreader.tell_all(whole_record(local, context.now))

    def _learn(self, records: tuple[Record, ...]) -> None:
        """Merge another's view. A newcomer does not tell on what everybody else knows."""
        config = self._context.config
        newcomer = self._context.running - self._started < config.newcomer_s
        self._spreader.muted = newcomer and len(records) > config.small
        for record in records:
            self._merger.apply(record, whole=True)
        self._spreader.muted = False

    def on_push(self, push: SyncPush, source: str) -> None:
        """Merge; if it said that we are down, answer the pusher directly: no gossip of ours reaches it yet."""
        roster = self._context.roster
        before = roster.local.version
        self._learn(push.records)
        member = roster.members.get(NodeId(source))
        if roster.local.version != before and member is not None and roster.local.state != LEFT:
            self._context.send(member.address, Gossip((whole_record(roster.local, self._context.now),)))


def _differing(mine: bytes, theirs: bytes) -> list[int]:
    return [b for b in range(BUCKETS) if mine[8 * b : 8 * b + 8] != theirs[8 * b : 8 * b + 8]]


def _fitting(records: list[Record], room: int) -> list[Record]:
    """As many as fit; a single bucket may be larger than a message, and the rest waits for the next Sync."""
    kept = []
    for record in records[:MAX_UPDATES]:
        room -= record_size(record)
        if room < 0:
            break
        kept.append(record)
    return kept
