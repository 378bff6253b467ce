"""The worker's side of KV events for one data-parallel rank (docs/design/kv-events.md).

Turns engine events into numbered batches, knows the live set and its digest, and answers replays and snapshots.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from p2pdyn.core.kvblocks import KvBlocks
from p2pdyn.engines.base import KvEvent
from p2pdyn.wire.events import MAX_OPS, KvBatch, KvDigest
from p2pdyn.wire.kvpack import (
    CLEARED,
    HASH_BYTES,
    MAX_RUNS,
    OP_BYTES,
    REMOVED,
    STORED,
    SWAP_BYTES,
    TIERS,
    Op,
    combine,
    pack_ops,
    pack_replay,
    pack_snapshot,
    xor_all,
)

REPLAY_BYTES = 4_000_000
"""Of packed batches kept: half a million blocks, seconds of any engine; beyond that a snapshot is smaller."""

_SNAPSHOT_RUN = 16384


class KvJournal:
    """``seq`` is the last batch's, 0 before the first of an epoch. ``worker`` and ``epoch`` stand in each message.

    ``max_ops`` and ``max_runs`` bound one batch, in bytes and ops.
    """

    def __init__(
        self,
        worker: str,
        epoch: int,
        rank: int,
        block_size: int,
        *,
        replay_bytes: int = REPLAY_BYTES,
        max_ops: int = MAX_OPS,
        max_runs: int = MAX_RUNS,
    ) -> None:
        self.worker = worker
        self.epoch = epoch
        self.rank = rank
        self.seq = 0
        self._names = KvBlocks(block_size)
        self._live = [self._names.held(tier) for tier in range(TIERS)]
        self._xors = [0] * TIERS
        self._digests = 0
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._replay_bytes = replay_bytes
        self._max_ops = max_ops
        self._max_runs = max_runs

    @property
    def orphans(self) -> int:
        """Stored blocks that could not be named and so were not told of."""
        return self._names.orphans

    @property
    def blocks(self) -> int:
        """(hash, tier) pairs in the cache."""
        return sum(map(len, self._live))

    def take(self, events: Iterable[KvEvent]) -> list[KvBatch]:
        """The batches that tell of one engine step: none if it changed nothing, several if it changed very much."""
        ops: list[Op] = []
        for event in events:
            for op in self._names.apply(event):
                self._add(op, ops)
        return [self._number(pack_ops(part)) for part in self._split(_gathered(ops))]

    def digest(self) -> KvDigest:
        """The state now. Each call makes a new one, numbered so that a receiver can tell an old one."""
        self._digests += 1
        return KvDigest(self.worker, self.epoch, self.rank, self.seq, self._digests, self.blocks, combine(self._xors))

    def replay(self, epoch: int, first: int) -> bytes | None:
        """The batches from ``first`` to the last (none if ``first`` is the next), or None if they are not kept."""
        oldest = self.seq + 1 - len(self._kept)
        if epoch != self.epoch or not oldest <= first <= self.seq + 1:
            return None
        return pack_replay(epoch, first, islice(self._kept, first - oldest, None))

    def snapshot(self) -> bytes:
        """The live set as of ``seq``."""
        ops = []
        for tier, live in enumerate(self._live):
            hashes = array("Q", live)
            runs = range(0, len(hashes), _SNAPSHOT_RUN)
            ops += [Op(STORED, tier, hashes[at : at + _SNAPSHOT_RUN]) for at in runs]
        return pack_snapshot(self.epoch, self.seq, ops)

    def raise_epoch(self, epoch: int) -> None:
        """Begin a new epoch: what is cached stays, numbers begin again, nothing earlier is replayed."""
        if epoch > self.epoch:
            self.epoch, self.seq, self._digests = epoch, 0, 0
            self._kept.clear()
            self._kept_bytes = 0

    def held(self) -> set[tuple[int, int]]:
        """Each (hash, tier): for tests and reports."""
        return {(one, tier) for tier, live in enumerate(self._live) for one in live}

    def _add(self, op: Op, ops: list[Op]) -> None:
        """Take a change of the live set into the digest, and into ``ops``, behind the last if it is alike."""
        kind, tier, hashes = op
        if kind == CLEARED:
            self._xors = [0] * TIERS
            ops[:] = [op]  # whatever the step did before is undone
            return
        self._xors[tier] ^= xor_all(hashes)
        if ops and ops[-1][:2] == (kind, tier):
            ops[-1].hashes.extend(hashes)
        else:
            ops.append(op)

    def _split(self, ops: list[Op]) -> Iterator[list[Op]]:
        most = self._max_ops - SWAP_BYTES
        if len(ops) <= self._max_runs and sum(OP_BYTES + HASH_BYTES * len(op.hashes) for op in ops) <= most:
            if ops:
                yield ops
            return
        part: list[Op] = []
        room = most
        for kind, tier, hashes in ops:
            at = 0
            while at < len(hashes) or kind == CLEARED:
                fits = (room - OP_BYTES) // HASH_BYTES
                if fits < 1 or len(part) == self._max_runs:
                    yield part
                    part, room = [], most
                    continue
                run = hashes[at : at + fits]
                part.append(Op(kind, tier, run))
                room -= OP_BYTES + HASH_BYTES * len(run)
                at += fits
                if kind == CLEARED:
                    break
        if part:
            yield part

    def _number(self, ops: bytes) -> KvBatch:
        self.seq += 1
        self._kept.append(ops)
        self._kept_bytes += len(ops)
        while self._kept_bytes > self._replay_bytes:
            self._kept_bytes -= len(self._kept.popleft())
        return KvBatch(self.worker, self.epoch, self.rank, self.seq, ops)


def _gathered(ops: list[Op]) -> list[Op]:
    """The same with one op a kind and tier, a tier's removals before its stores, unless a block both comes and goes:
    what a run costs a frontend hardly grows with its length, and under load a full cache takes and gives by turns."""
    if len(ops) < 2 or ops[0].kind == CLEARED:
        return ops
    runs: dict[tuple[int, int], array[int]] = {}
    for kind, tier, hashes in ops:
        runs.setdefault((tier, -kind), array("Q")).extend(hashes)
    for tier in range(TIERS):
        gone = runs.get((tier, -REMOVED))
        if gone and not set(gone).isdisjoint(runs.get((tier, -STORED), ())):
            return ops
    return [Op(-kind, tier, runs[tier, kind]) for tier, kind in sorted(runs)]
