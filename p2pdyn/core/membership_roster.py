"""The members a node knows, what each is thought to be, and whom to probe next."""

from __future__ import annotations

import random
from collections.abc import Container
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from p2pdyn.core.membership_rings import Rings
from p2pdyn.core.types import DEAD, LEFT, SUSPECT, Address, NodeId, Version
from p2pdyn.wire.control import BUCKETS, Record

ALIVE = "alive"
STATES = (ALIVE, SUSPECT, DEAD, LEFT)
"""By wire code, which is also their order: of two records of one version the later state wins."""
CODES = {state: code for code, state in enumerate(STATES)}


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

    @property
    def live(self) -> bool:
        return self.state == ALIVE or self.state == SUSPECT


def whole_record(member: Member, now: float) -> Record:
    """All that is known of a member, as a Sync or the news of a live one carries it."""
    age = 0 if member.live else max(0, int(now - member.since))
    host, port = member.address.host, member.address.port
    version = member.version
    return Record(
        member.id,
        version.epoch,
        version.incarnation,
        CODES[member.state],
        "",
        host,
        port,
        member.info,
        min(age, 2**32 - 1),
    )


def rumour(member: Member, state: str, origin: str) -> Record:
    """The news that a member is suspect, dead or gone; short, as whoever cares knows its address."""
    return Record(member.id, member.version.epoch, member.version.incarnation, CODES[state], origin, "", 0, b"", 0)


def bucket_of(node: str) -> int:
    """Which digest bucket a node counts in. Ids are random hex, so the last digits spread evenly."""
    try:
        return int(node[-2:], 16) % BUCKETS
    except ValueError:
        return 0


@lru_cache(maxsize=16384)
def _fingerprint(node: str, epoch: int, incarnation: int, state: str) -> int:
    text = f"{node}/{epoch}/{incarnation}/{state}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


class Roster:
    """All members, this node included, with what must stay cheap at 1000: sampling, probe order, digests."""

    def __init__(self, local: Member, rng: random.Random, rings: int) -> None:
        self._rng = rng
        self.id = local.id
        self.rings = Rings(local.id, rings)
        self._turn = 0
        self.members: dict[NodeId, Member] = {}
        self.live: list[NodeId] = []
        """Others that are alive or suspect, in no order."""
        self.down: dict[NodeId, None] = {}
        """Dead and left ones, the longest so first."""
        self._place: dict[NodeId, int] = {}
        self._by_address: dict[Address, NodeId] = {}
        self._digests = [0] * BUCKETS
        self._round: list[NodeId] = []
        self.put(local)

    @property
    def local(self) -> Member:
        return self.members[self.id]

    @property
    def nodes(self) -> int:
        """Live nodes, this one included: the N of all formulas."""
        return len(self.live) + 1

    def holder(self, address: Address) -> Member | None:
        """The live member, if any, that is known to listen at ``address``."""
        node = self._by_address.get(address)
        member = self.members.get(node) if node is not None else None
        return member if member is not None and member.live else None

    def put(self, member: Member) -> Member | None:
        """Insert or replace; returns what was there."""
        old = self.members.get(member.id)
        if old is not None:
            self._toggle_digest(old)
            if old.address != member.address and self._by_address.get(old.address) == member.id:
                del self._by_address[old.address]
        self.members[member.id] = member
        self._toggle_digest(member)
        if member.live:
            self._by_address[member.address] = member.id
            self.down.pop(member.id, None)
        if member.id != self.id:
            self._list(member)
        return old

    def forget(self, node: NodeId) -> None:
        """Drop a dead or left member."""
        member = self.members.pop(node)
        self._toggle_digest(member)
        self.down.pop(node, None)
        if self._by_address.get(member.address) == node:
            del self._by_address[member.address]

    def seen(self, node: str, now: float) -> None:
        """The member itself was heard."""
        m = self.members.get(NodeId(node))
        if m is not None and m.live:
            self.members[m.id] = Member(m.id, m.version, m.address, m.state, m.info, m.since, now)

    def sample(self, count: int, exclude: Container[NodeId]) -> list[NodeId]:
        """Up to ``count`` different live others, at random."""
        if not self.live:
            return []
        drawn = self._rng.sample(self.live, min(len(self.live), count + 4))
        return [node for node in drawn if node not in exclude][:count]

    def next_subject(self) -> Member | None:
        """Each of one's subjects in turn, at even distances, and then somebody out of all."""
        subjects = self.rings.subjects()
        self._turn = (self._turn + 1) % (len(subjects) + 1)
        return self.members[subjects[self._turn - 1]] if self._turn else self.next_of_all()

    def next_of_all(self) -> Member | None:
        """Round-robin over all live others in an order shuffled anew for each round, so that each gets its turn."""
        for _ in range(2):
            while self._round:
                member = self.members.get(self._round.pop())
                if member is not None and member.live:
                    return member
            self._round = self.live.copy()
            self._rng.shuffle(self._round)
        return None

    def digests(self) -> bytes:
        """Little-endian u64 a bucket: XOR of its members' fingerprints."""
        return b"".join(digest.to_bytes(8, "little") for digest in self._digests)

    def _toggle_digest(self, member: Member) -> None:
        version = member.version
        fingerprint = _fingerprint(member.id, version.epoch, version.incarnation, member.state)
        self._digests[bucket_of(member.id)] ^= fingerprint

    def _list(self, member: Member) -> None:
        node = member.id
        if member.live and node not in self._place:
            self._place[node] = len(self.live)
            self.live.append(node)
            self.rings.joined(node)
            self._round.insert(self._rng.randint(0, len(self._round)), node)
        elif not member.live and node not in self.down:
            self.down[node] = None
            if node in self._place:
                place = self._place.pop(node)
                last = self.live.pop()
                if last != node:
                    self.live[place] = last
                    self._place[last] = place
                self.rings.gone(node, self.live)
