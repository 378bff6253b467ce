"""What a frontend believes of one routing target's KV cache, and how sure it is (docs/design/kv-events.md).

A pure machine for each (worker, dp_rank): batches and digests go in, :class:`Fetch` comes out, ops go to the index.
The rules:

* A batch is applied only behind the one before it; a later one waits in a buffer while what is missing is fetched.
* One fetch at a time. A replay repairs a hole; a snapshot begins anew, in a slot of its own, filled in slices while the
  old blocks go on serving, and takes over when it is complete.
* Only a digest that matches makes EXACT, and only for :data:`STALE_S`. One that differs makes DEGRADED.
* What no honest worker sends (a number far ahead, ops that do not parse) costs a fetch and never an exception.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import inf

from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.kvsignals import Counters, Fetch, Fetched, FetchFailed, Lost, Tick, Up
from p2pdyn.core.kvtarget import TargetBlocks
from p2pdyn.wire.events import KvBatch, KvDigest
from p2pdyn.wire.kvbatch import batch_tag
from p2pdyn.wire.kvpack import CLEARED, HASH_BYTES, Run, unpack_ops, unpack_replay, unpack_snapshot
from p2pdyn.wire.shape import WireError

DIGEST_S = 1.0
"""A worker's digest; two bound how long a stream may be wrong and call itself exact."""

STALE_S = 2 * DIGEST_S
FETCH_RETRY_S = 0.1
FETCH_RETRY_MAX_S = 2.0
"""Wait after a failed fetch, doubling: a busy worker is not asked more often."""

FULL_RETRY_S = 60.0
"""A target with more blocks than fit is asked for a snapshot this often."""

MAX_BUFFER = 4096
MAX_BUFFER_BYTES = 4_000_000
"""Batches held while some are missing; those past it are fetched again."""

MAX_BLOCKS = 2**22
"""Blocks of one target."""

SLICE = 8192
"""Blocks of a snapshot applied at once: about 2 ms."""

NEW, REPLAYING, EXACT, GAP, DEGRADED = "NEW", "REPLAYING", "EXACT", "GAP", "DEGRADED"

REPLAY, SNAPSHOT = "kv-replay", "kv-snapshot"

Event = KvBatch | KvDigest | Up | Lost | Fetched | FetchFailed | Tick


class KvStream:
    """``state`` and ``why`` (a sentence, empty when EXACT) are as of the last :meth:`handle`.

    The caller carries out each :class:`Fetch` and calls ``handle(Tick(), now)`` at :meth:`next_deadline`.
    """

    def __init__(self, index: KvIndex, rank: int, *, max_blocks: int = MAX_BLOCKS) -> None:
        self.state = NEW
        self.why = ""
        self.epoch = 0
        self.take: Callable[[bytes], bool] = _take_nothing
        """Takes a batch from its bytes, at little cost, if nothing follows from it but other blocks, as mostly. False:
        nothing was done, and :meth:`handle` is to have it, decoded."""
        self.counters = Counters()
        self._index = index
        self._rank = rank
        self._max_blocks = max_blocks
        self._tickets = 0
        self._up = False
        self._base: TargetBlocks | None = None
        self._filling: TargetBlocks | None = None
        self._reset()
        self._judge(0.0)

    def _reset(self) -> None:
        """Forget all that holds for one epoch on one connection."""
        for base in (self._base, self._filling):
            if base is not None:
                base.drop()
        self._base = self._filling = None
        self._rest: Iterator[Run] = iter(())  # of the snapshot that fills self._filling
        self._part: deque[Run] = deque()  # of batch seq + 1, the first of which are applied
        self._top = 0  # the highest seq known to exist, where that is above base.seq
        self._number = 0  # the last digest's
        self._buffer: dict[int, bytes] = {}
        self._buffered = 0
        self._open: Fetch | None = None
        self._retry_at = 0.0
        self._snapshot_at = 0.0
        self._delay = FETCH_RETRY_S
        self._proved = False
        self._calm_until = -inf
        self._heard = 0.0  # when a digest last matched or a repair was complete
        self._wrong = ""
        self._full = ""
        self._full_at = 0.0

    @property
    def seq(self) -> int:
        """The last batch applied; 0 while there is no snapshot."""
        return self._base.seq if self._base else 0

    @property
    def blocks(self) -> int:
        """(hash, tier) pairs in the index for this target."""
        return self._base.blocks if self._base else 0

    @property
    def slot(self) -> int | None:
        """The target's in the index, None while it has none. A snapshot, a cleared cache or an epoch changes it."""
        return self._base.slot if self._base else None

    def handle(self, event: Event, now: float) -> list[Fetch]:
        """Take one event. Raises nothing, whatever a peer sent."""
        if type(event) is KvBatch and self._change_calm(event, now):
            return []
        self._dispatch(event, now)
        self._fill(now)
        self._drain(now)
        fetches = self._ask(now)
        self._judge(now)
        return fetches

    def _change_calm(self, batch: KvBatch, now: float) -> bool:
        """Apply the next batch of a calm stream, if no fetch, no other state and no other slot follow from it. False if
        some may; then nothing is done."""
        base, ops = self._base, batch.ops
        if now >= self._calm_until or base is None or batch.seq != base.seq + 1 or batch.epoch != self.epoch:
            return False
        blocks = len(ops) // HASH_BYTES  # or less
        if blocks > SLICE or not base.fits(blocks):
            return False
        try:
            runs = unpack_ops(ops)
        except WireError:
            return False
        if any(kind == CLEARED for kind, _, _ in runs):
            return False
        base.change(runs)
        base.seq = batch.seq
        base.tag = batch_tag(batch.worker, batch.epoch, batch.rank)
        return True

    def _dispatch(self, event: Event, now: float) -> None:
        match event:
            case KvBatch():
                if self._up and self._is_current(event.epoch):
                    self._on_batch(event)
            case KvDigest():
                if self._up and self._is_current(event.epoch) and event.number > self._number:
                    self._number = event.number
                    self._on_digest(event, now)
            case Fetched():
                if self._open and event.ticket == self._open.ticket:
                    self._on_answer(self._open, event.data, now)
            case FetchFailed():
                if self._open and event.ticket == self._open.ticket:
                    self._fail(now)
            case Up():
                self._up = True
            case Lost():
                self._up, self.epoch = False, 0
                self._reset()
            case Tick():
                pass

    def next_deadline(self) -> float | None:
        """In the past while a snapshot, a replay or a large batch is being applied."""
        if self.state == EXACT:
            return self._heard + STALE_S
        if self._filling or self._can_drain():
            return 0.0
        due = []
        if self._needed() and not self._open:
            due.append(self._earliest())
        if self.state == REPLAYING:
            due.append(self._heard + STALE_S)
        return min(due, default=None)

    # What the worker publishes

    def _is_current(self, epoch: int) -> bool:
        """False for an earlier epoch. A later one begins anew: the blocks of the one before leave."""
        if epoch < self.epoch:
            self.counters.ignored += 1
            return False
        if epoch > self.epoch:
            if self.epoch:
                self._reset()
            self.epoch = epoch
        return True

    def _on_batch(self, batch: KvBatch) -> None:
        base = self._base
        if base and batch.seq <= base.seq:
            self.counters.ignored += 1
            return
        self._top = max(self._top, batch.seq)
        is_next = base is not None and batch.seq == base.seq + 1 and not self._filling
        if base and is_next and not self._buffer and len(batch.ops) <= SLICE * HASH_BYTES:
            self._apply(base, batch.ops)
        elif batch.seq not in self._buffer and (
            is_next or (len(self._buffer) < MAX_BUFFER and self._buffered + len(batch.ops) <= MAX_BUFFER_BYTES)
        ):
            self._hold(batch.seq, batch.ops)

    def _on_digest(self, digest: KvDigest, now: float) -> None:
        base = self._base
        if base is None or digest.seq > base.seq:
            self._top = max(self._top, digest.seq)
        elif self._part:
            return  # half of the next batch is in the index, so that there is nothing to compare
        elif digest.seq < base.seq:  # overtaken by a replay, or we were sent what the worker never did
            if now >= self._heard + STALE_S:
                self._wrong = "the worker is behind what it published"
        elif (digest.blocks, digest.xor) == base.digest():
            self._wrong = self._full = ""
            if not self._open and not self._filling:
                self._proved, self._heard = True, now
                self._delay, self._snapshot_at = FETCH_RETRY_S, 0.0
        elif not self._full or now >= self._full_at:
            self._wrong = f"its digest of {digest.blocks} blocks differs from that of the {base.blocks} known here"

    # Blocks

    def _apply(self, base: TargetBlocks, data: bytes) -> None:
        """Apply batch ``base.seq + 1``, all or nothing."""
        for run in self._unpack(base, data):
            self._change(base, run)
        base.seq += 1

    def _unpack(self, base: TargetBlocks, data: bytes) -> list[Run]:
        try:
            return unpack_ops(data)
        except WireError as error:
            self.counters.malformed += 1
            self._wrong = f"batch {base.seq + 1} was malformed ({error})"
            return []

    def _change(self, base: TargetBlocks, run: Run) -> None:
        if run[0] == CLEARED:
            self._full = ""
        if not base.fit(run):
            self._full = f"it holds more blocks than the {base.blocks} for which there is room"

    def _hold(self, seq: int, ops: bytes) -> None:
        self._buffered += len(ops) - len(self._buffer.get(seq, b""))
        self._buffer[seq] = ops

    def _can_drain(self) -> bool:
        return self._base is not None and not self._filling and self._base.seq + 1 in self._buffer

    def _drain(self, now: float) -> None:
        """Apply a slice of what is buffered and next; a batch leaves the buffer when all of it is applied."""
        if not self._can_drain():
            return
        base = self._base
        assert base is not None
        if self._top > base.seq + 1:  # it closes a gap, and is not one large batch
            self._heard = now
        budget = SLICE
        while budget > 0 and (ops := self._buffer.get(base.seq + 1)) is not None:
            if not self._part:
                self._part = deque(_slices(self._unpack(base, ops)))
            while self._part and budget > 0:
                run = self._part.popleft()
                self._change(base, run)
                budget -= 1 + len(run[2]) // HASH_BYTES
            if not self._part:
                base.seq += 1
                self._buffered -= len(self._buffer.pop(base.seq))
        self._trim(base)

    def _trim(self, base: TargetBlocks) -> None:
        """Let go of what is past, and of numbers too far ahead to be true."""
        for seq in [seq for seq in self._buffer if not base.seq < seq <= base.seq + MAX_BUFFER]:
            self._buffered -= len(self._buffer.pop(seq))

    def _fill(self, now: float) -> None:
        """Apply a slice of the snapshot; once it is whole, it takes over."""
        base = self._filling
        if base is None:
            return
        budget = SLICE
        for run in self._rest:
            self._change(base, run)
            budget -= len(run[2]) // HASH_BYTES
            if budget <= 0:
                return
        if self._base:
            self._base.drop()
        self._base, self._filling = base, None
        self._part.clear()
        self._wrong, self._proved, self._heard = "", False, now
        self._full_at = now + FULL_RETRY_S
        self._trim(base)

    # Fetches

    def _needed(self) -> str:
        """What has to be fetched if nothing is under way: a snapshot, a replay or, empty, nothing."""
        if not self._up or self._filling or self._can_drain():
            return ""
        if self._base is None or self._wrong:
            return SNAPSHOT
        return REPLAY if self._top > self._base.seq else ""

    def _ask(self, now: float) -> list[Fetch]:
        what = self._needed()
        if not what or self._open or now < self._earliest():
            return []
        self._tickets += 1
        if what == REPLAY:
            self.counters.replays += 1
            self._open = Fetch(self._tickets, what, f"{self._rank}:{self.epoch}:{self.seq + 1}")
        else:
            self.counters.snapshots += 1
            self._open = Fetch(self._tickets, what, str(self._rank))
            self._snapshot_at = self._later(
                now
            )  # until a digest matches: nonsense without end is asked about ever less
        return [self._open]

    def _earliest(self) -> float:
        """When what is needed may be asked for."""
        return max(self._retry_at, self._snapshot_at) if self._needed() == SNAPSHOT else self._retry_at

    def _later(self, now: float) -> float:
        due, self._delay = now + self._delay, min(2 * self._delay, FETCH_RETRY_MAX_S)
        return due

    def _fail(self, now: float) -> None:
        self.counters.failed += 1
        self._open = None
        self._retry_at = self._later(now)

    def _on_answer(self, fetch: Fetch, data: bytes | None, now: float) -> None:
        try:
            if fetch.what == SNAPSHOT:
                self._on_snapshot(data, now)
            else:
                self._on_replay(data, now)
        except WireError as error:
            self.counters.malformed += 1
            self._wrong = f"its answer was malformed ({error})"
            self._fail(now)

    def _on_snapshot(self, data: bytes | None, now: float) -> None:
        if data is None:
            self._fail(now)
            return
        snapshot = unpack_snapshot(data)
        if not self._is_current(snapshot.epoch):
            self._fail(now)
            return
        self._open = None
        self._full = ""
        self._filling = TargetBlocks(self._index, snapshot.seq, self._max_blocks)
        self._rest = _slices(snapshot.runs)
        self._top = max(self._top, snapshot.seq)

    def _on_replay(self, data: bytes | None, now: float) -> None:
        """The worker's word up to its last batch: what is said to be behind that and is not here, is not."""
        base = self._base
        assert base is not None
        replay = unpack_replay(data) if data is not None else None
        if replay is None or replay.epoch != self.epoch or replay.first > base.seq + 1:
            self._open = None
            self._wrong = "the batches that are missing are no longer kept"
            return
        for seq, ops in enumerate(replay.batches, replay.first):
            if seq > base.seq:
                self._hold(seq, ops)
        self._open = None
        self._heard, self._proved = now, False
        if not self._can_drain():
            self._buffer.clear()
            self._buffered = 0
            self._retry_at = self._later(now)
        self._trim(base)
        self._top = max(self._buffer, default=base.seq)

    # What it comes to

    def _judge(self, now: float) -> None:
        before = self.state
        self.state, self.why = self._verdict(now)
        calm = self.state == EXACT or (self.state == REPLAYING and not self._buffer and not self._filling)
        self._calm_until = self._heard + STALE_S if calm else -inf
        self.take = self._base.take if calm and self._base else _take_nothing
        if self.state != EXACT:
            self._proved = False
        if self.state != before:
            self.counters.gaps += self.state == GAP
            self.counters.degraded += self.state == DEGRADED

    def _verdict(self, now: float) -> tuple[str, str]:
        base = self._base
        if not self._up:
            return NEW, "its events are not connected"
        if base is None:
            return NEW, "its first snapshot has not come yet"
        if self._top > base.seq + bool(self._part):
            return GAP, self._wrong or f"batches from {base.seq + 1} are missing, {self._top} is known to exist"
        if self._wrong or self._full:
            return DEGRADED, self._wrong or self._full
        if now >= self._heard + STALE_S:
            return GAP, f"no digest has matched for {STALE_S:g} s"
        if self._part:
            return REPLAYING, f"batch {base.seq + 1} is large and is being applied in slices"
        if self._proved:
            return EXACT, ""
        return REPLAYING, "no digest has confirmed the repair yet"


def _slices(runs: list[Run]) -> Iterator[Run]:
    for kind, tier, packed in runs:
        for at in range(0, len(packed) or 1, SLICE * HASH_BYTES):  # or 1: cleared is a run without hashes
            yield kind, tier, packed[at : at + SLICE * HASH_BYTES]


def _take_nothing(_: bytes) -> bool:
    return False
