"""One routing target's blocks in the index: what is in its slot, how many, and their digest."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import xor

from p2pdyn.core.kvindex import KvIndex
from p2pdyn.wire.kvpack import CLEARED, HASH_BYTES, STORED, TIERS, One, Run, combine, hashes_of, lanes


class TargetBlocks:
    """``blocks`` (hash, tier) pairs in ``slot``, as of batch ``seq``; at most ``max_blocks``."""

    __slots__ = ("_index", "_max_blocks", "_xors", "blocks", "seq", "slot")

    def __init__(self, index: KvIndex, seq: int, max_blocks: int) -> None:
        self.slot = index.add()
        self.seq = seq
        self.blocks = 0
        self._index = index
        self._max_blocks = max_blocks
        self._xors = [0] * TIERS  # of each tier's hashes, in lanes

    def digest(self) -> tuple[int, int]:
        """``blocks`` and ``xor`` of a :class:`p2pdyn.wire.events.KvDigest`."""
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

    def change(self, runs: Iterable[Run]) -> None:
        """Store and remove blocks for which there is room."""
        index, slot, xors = self._index, self.slot, self._xors
        for kind, tier, packed in runs:
            hashes = hashes_of(packed)
            if kind == STORED:
                same = index.store(slot, tier, hashes)
                self.blocks += len(hashes) - len(same)
            else:
                same = index.remove(slot, tier, hashes)
                self.blocks -= len(hashes) - len(same)
            xors[tier] ^= reduce(xor, same, lanes(packed)) if same else lanes(packed)

    def change_ones(self, ones: Iterable[One]) -> None:
        """The same for blocks one by one, which is the faster way for a few."""
        index, slot, xors = self._index, self.slot, self._xors
        for kind, tier, key in ones:
            if kind == STORED:
                if index.store_one(slot, tier, key):
                    self.blocks += 1
                    xors[tier] ^= key
            elif index.remove_one(slot, tier, key):
                self.blocks -= 1
                xors[tier] ^= key

    def fit(self, run: Run) -> bool:
        """Take a run of any kind, of a store as much as there is room for. False if that was not all."""
        kind, tier, packed = run
        if kind == CLEARED:
            if self.blocks:
                self.drop()
                self.slot, self.blocks, self._xors = self._index.add(), 0, [0] * TIERS
            return True
        fits = packed[: HASH_BYTES * max(0, self.room())] if kind == STORED else packed
        self.change(((kind, tier, fits),))
        return len(fits) == len(packed)
