"""Blocks of an engine that other workers read or write (docs/design/kv-transfer.md): their references and their tags.

Whoever is told of a block as held, or may write into one, has a reference to it, so the engine can not use it again
before the peer says that this is over.  A held block has its tag behind the blocks: who reads late finds another, or
zeroes.  Reserved blocks of a sequence that still waits for them are the sequence's; they come here only if it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from struct import Struct

from p2pdyn.engines.base import Held, Pin, Release, Reserved, Settle, TransferNote, TransferOrder
from p2pdyn.engines.memory import TAG_BYTES
from p2pdyn.engines.paged import PagedBlocks

TAG = Struct("<8sQQ8x")
"""First half of the block's key, the worker's epoch, the block's generation; all zero while nobody holds the block."""
_NONE = bytes(TAG_BYTES)
assert TAG.size == TAG_BYTES


class Lending:
    """``epoch`` is the worker's; it is only a label here."""

    def __init__(self, cache: PagedBlocks, epoch: int) -> None:
        self.tags = memoryview(b"")
        """Set once the memory is there, before the first order: TAG_BYTES a block, all zero."""
        self.held: dict[int, list[int]] = {}
        """By key of the :class:`Held`: what others read."""
        self.foreign: dict[int, list[int]] = {}
        """By key of the :class:`Reserved`: what others may write, with no sequence to wait for it."""
        self._cache = cache
        self._epoch = epoch
        self._holds: dict[int, int] = {}  # of each tagged block
        self._notes: list[TransferNote] = []

    @property
    def waiting(self) -> bool:
        """There are notes for the next step."""
        return bool(self._notes)

    def take_notes(self) -> list[TransferNote]:
        """What the peer has to be told since the last call, in order."""
        notes, self._notes = self._notes, []
        return notes

    def reserve(self, key: int, blocks: Sequence[int], keys: Sequence[bytes], cached: int, upto: int) -> int:
        """Tell that a sequence has its ``blocks``; those between these indices are to be filled. The latter, or 0 if
        there are none."""
        upto = max(cached, upto)
        self._notes.append(Reserved(key, cached, tuple(blocks[cached:upto]), tuple(keys[cached:upto])))
        return upto if upto > cached else 0

    def hold(self, key: int, blocks: list[int], keys: Sequence[bytes], cached: int = 0) -> None:
        """Full blocks, whose references come with them, stay until the release of ``key``."""
        cache, holds = self._cache, self._holds
        generations = tuple([cache.generation(block) for block in blocks])
        for block, name, generation in zip(blocks, keys, generations, strict=True):
            TAG.pack_into(self.tags, block * TAG_BYTES, name[:8], self._epoch, generation)
            holds[block] = holds.get(block, 0) + 1
        if blocks:
            self.held[key] = blocks
        self._notes.append(Held(key, tuple(blocks), generations, tuple(keys), cached))

    def pin(self, order: Pin) -> None:
        blocks = self._cache.cached(order.keys)
        self._cache.acquire(blocks)
        self.hold(order.key, blocks, order.keys[: len(blocks)])

    def leave(self, key: int, blocks: list[int]) -> None:
        """Reserved blocks, whose references come with them, are left to whoever may write into them."""
        self.foreign[key] = blocks

    def carry_out(self, order: TransferOrder, settle: Callable[[Settle], bool]) -> None:
        """``settle`` hands a Settle to the sequence that waits for it; False if that is gone."""
        match order:
            case Pin():
                self.pin(order)
            case Release():
                self.release(order)
            case Settle():
                if not settle(order) and order.over:
                    self.written(order.key)

    def written(self, key: int) -> None:
        """Nobody writes into what was left any more."""
        self._cache.release(reversed(self.foreign.pop(key, ())))

    def release(self, order: Release) -> None:
        self.written(order.key)
        blocks = self.held.pop(order.key, ())
        for block in blocks:
            self._holds[block] -= 1
            if not self._holds[block]:
                del self._holds[block]
                self.tags[block * TAG_BYTES : (block + 1) * TAG_BYTES] = _NONE
        self._cache.release(reversed(blocks))

    def blocks(self) -> Iterator[list[int]]:
        """Every reference from here, for :meth:`PagedBlocks.check`."""
        yield from self.held.values()
        yield from self.foreign.values()

    def close(self) -> None:
        for key in (*self.held, *self.foreign):
            self.release(Release(key))
        self._notes.clear()
