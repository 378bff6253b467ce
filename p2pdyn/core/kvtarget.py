"""One routing target's blocks in the index: what is in its slot, how many, and their digest."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import xor

from p2pdyn.core.kvindex import KvIndex
from p2pdyn.wire.kvbatch import HASHES_AT, swap_shape
from p2pdyn.wire.kvpack import CLEARED, DEVICE, HASH_BYTES, STORED, TIERS, Run, combine, hashes_of, xor_packed

_UNSUMMED = 8192
"""Bytes of hashes put by: one sum over many costs a fraction of many small ones."""


class TargetBlocks:
    """``blocks`` (hash, tier) pairs in ``slot``, as of batch ``seq``; at most ``max_blocks``."""

    __slots__ = ("_index", "_max_blocks", "_unsummed", "_xors", "blocks", "seq", "slot", "tag")

    def __init__(self, index: KvIndex, seq: int, max_blocks: int) -> None:
        self.slot = index.add()
        self.seq = seq
        self.blocks = 0
        self.tag = b""
        """What :func:`~p2pdyn.wire.kvbatch.batch_tag` makes of its batches; empty: not known."""
        self._index = index
        self._max_blocks = max_blocks
        # Of each tier the XOR over its hashes: a number, and packed hashes that are still to be added to it.
        self._xors = [0] * TIERS
        self._unsummed = [bytearray() for _ in range(TIERS)]

    def digest(self) -> tuple[int, int]:
        """``blocks`` and ``xor`` of a :class:`p2pdyn.wire.events.KvDigest`."""
        for tier in range(TIERS):
            self._sum(tier)
        return self.blocks, combine(self._xors)

    def room(self) -> int:
        """Blocks that may still be stored."""
        own, whole = self._max_blocks - self.blocks, self._index.room()
        return own if own < whole else whole

    def fits(self, count: int) -> bool:
        """Whether so many blocks may still be stored."""
        return count <= self._max_blocks - self.blocks and self._index.fits(count)

    def drop(self) -> None:
        """None of the blocks is found any more. Idempotent."""
        self._index.drop(self.slot)

    def take(self, data: bytes) -> bool:
        """Apply a :class:`~p2pdyn.wire.events.KvBatch`, from its bytes, if it is what almost every one is: the next one
        by its ``tag``, that tells of the device tier alone, and fits. False if not; then nothing is done."""
        shape = swap_shape(len(data))
        if shape is None:
            return False
        right, unpack = shape
        lead, tag, seq, removed, stored, *gone = unpack(data)
        if lead != right or tag != self.tag or seq != self.seq + 1 or removed + stored != len(gone):
            return False
        come = gone[removed:]
        del gone[removed:]
        if self.blocks + stored > self._max_blocks:
            return False
        done = self._index.swap(self.slot, gone, come)
        if done is None:
            return False
        change, same = done
        self.blocks += change
        if same:
            self._xors[DEVICE] ^= reduce(xor, same)
        unsummed = self._unsummed[DEVICE]
        unsummed += data[HASHES_AT:]
        if len(unsummed) > _UNSUMMED:
            self._sum(DEVICE)
        self.seq = seq
        return True

    def change(self, runs: Iterable[Run]) -> None:
        """Store and remove blocks for which there is room."""
        index, slot = self._index, self.slot
        for kind, tier, packed in runs:
            hashes = hashes_of(packed)
            if kind == STORED:
                same = index.store(slot, tier, hashes)
                self.blocks += len(hashes) - len(same)
            else:
                same = index.remove(slot, tier, hashes)
                self.blocks -= len(hashes) - len(same)
            self._xors[tier] ^= reduce(xor, same, 0)
            self._unsummed[tier] += packed
            if len(self._unsummed[tier]) > _UNSUMMED:
                self._sum(tier)

    def fit(self, run: Run) -> bool:
        """Take a run of any kind, of a store as much as there is room for. False if that was not all."""
        kind, tier, packed = run
        if kind == CLEARED:
            if self.blocks:
                self.drop()
                self.slot, self.blocks, self._xors = self._index.add(), 0, [0] * TIERS
                self._unsummed = [bytearray() for _ in range(TIERS)]
            return True
        fits = packed[: HASH_BYTES * max(0, self.room())] if kind == STORED else packed
        self.change(((kind, tier, fits),))
        return len(fits) == len(packed)

    def _sum(self, tier: int) -> None:
        self._xors[tier] ^= xor_packed(self._unsummed[tier])
        self._unsummed[tier].clear()
