"""Bookkeeping of a paged KV cache: reference counts, prefix reuse, LRU eviction, events. No bytes, no clock.

Engine-neutral: whoever owns the bytes of the blocks asks here which block to use.  A block that is full and known by
its key (a digest of all tokens up to its end) may serve any sequence with that prefix.  Rules:

1. A block with references is never reused or evicted; one without is idle (it has a key) or free (it has none).
2. One key, one block: who fills a second copy gets the first one instead (:meth:`PagedBlocks.register`).
3. Sequences let go of their last block first, so of a chain the end is evicted first; with rule 2 the keyed blocks are
   closed under prefixes: where a block is cached, so are all before it.
4. Every change of the set of keyed blocks is one entry in the event log, in order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from struct import Struct

from p2pdyn.engines.base import BlocksRemoved, BlocksStored, KvEvent

KEY_BYTES = 16
_HASH = Struct("<Q8x")
_SIZES = Struct("<II")
_U32 = 2**32 - 1


class PagedBlocks:
    """``blocks`` blocks, named 0 to ``blocks - 1``."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._refs = [0] * blocks
        self._uses = [0] * blocks
        self._keys: list[bytes | None] = [None] * blocks
        self._by_key: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._log: list[KvEvent] = []
        self._removed: list[bytes] = []

    @property
    def available(self) -> int:
        """Blocks that :meth:`allocate` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.blocks - self.available

    def report(self) -> dict[int, int]:
        """Hash, as in the events, to block, of everything that a new sequence could reuse."""
        return {hash_of(key): block for key, block in self._by_key.items()}

    def reuse(self, keys: Sequence[bytes], total: int) -> tuple[list[int], int] | None:
        """Blocks for a sequence of ``total`` blocks: its longest cached prefix by ``keys``, then fresh ones, and how
        many are cached; None, and nothing is taken, if there are too few."""
        found = self.cached(keys)
        idle = self._idle
        if len(idle) + len(self._free) - sum(block in idle for block in found) < total - len(found):
            return None
        for block in found:
            self._acquire(block)
        fresh = total - len(found)
        self._evict(fresh - len(self._free))
        taken = sorted(self._free[len(self._free) - fresh :])  # in a row, they are cheaper to read
        del self._free[len(self._free) - fresh :]
        refs, uses = self._refs, self._uses
        for block in taken:
            refs[block] = 1
            uses[block] += 1
        return found + taken, len(found)

    def cached(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self) -> int:
        """A block of unspecified content; evicts the least recently used idle one if none is free.

        Raises KeyError unless :attr:`available` is positive.
        """
        self._evict(1 - len(self._free))
        block = self._free.pop()
        self._refs[block] = 1
        self._uses[block] += 1
        return block

    def acquire(self, blocks: Iterable[int]) -> None:
        """One reference more to each: cached blocks, or blocks that have references."""
        for block in blocks:
            self._acquire(block)

    def generation(self, block: int) -> int:
        """How often the block has been given out for new content (u32)."""
        return self._uses[block] & _U32

    def _evict(self, count: int) -> None:
        """Free the least recently used idle blocks."""
        idle, keys, by_key = self._idle, self._keys, self._by_key
        for _ in range(count):
            block, _ = idle.popitem(last=False)
            key = keys[block]
            assert key is not None
            keys[block] = None
            del by_key[key]
            self._removed.append(key)
            self._free.append(block)

    def register(self, blocks: list[int], keys: Sequence[bytes], start: int, stop: int) -> int:
        """Make a sequence's full blocks from ``start`` to before ``stop`` reusable under their keys. Where a key is
        known, its block takes the place of the sequence's. Returns the first that was new: by rules 2 and 3, so are
        all behind it."""
        by_key, known = self._by_key, self._keys
        while start < stop and (first := by_key.get(keys[start])) is not None:
            self._acquire(first)
            self.release((blocks[start],))
            blocks[start] = first
            start += 1
        for block, key in zip(blocks[start:stop], keys[start:stop], strict=True):
            by_key[key] = block
            known[block] = key
        return start

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference each, in this order: pass a sequence's blocks from its end."""
        refs, keys = self._refs, self._keys
        for block in blocks:
            refs[block] -= 1
            if refs[block] == 0:
                if keys[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def _acquire(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._idle[block]
        self._refs[block] += 1

    def stored(self, event: BlocksStored) -> None:
        """Log newly registered blocks."""
        self._flush_removed()
        self._log.append(event)

    def take_events(self) -> list[KvEvent]:
        """What has changed since the last call, in order."""
        self._flush_removed()
        log, self._log = self._log, []
        return log

    def _flush_removed(self) -> None:
        if self._removed:
            self._log.append(BlocksRemoved(hashes_of(self._removed)))
            self._removed.clear()

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError if a rule is broken; ``held`` are the block lists of all sequences."""
        refs = [0] * self.blocks
        for blocks in held:
            for block in blocks:
                refs[block] += 1
        assert refs == self._refs, "reference counts differ from what is held"
        idle, free = set(self._idle), set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not idle & free, "a block is both idle and free"
        assert {block for block, count in enumerate(refs) if not count} == idle | free, "a block is lost"
        assert all(self._keys[block] is not None for block in idle), "an idle block has no key"
        assert all(self._keys[block] is None for block in free), "a free block has a key"
        assert self._by_key == {key: block for block, key in enumerate(self._keys) if key is not None}


def hash_of(key: bytes) -> int:
    """The number by which events and reports name a block."""
    return int.from_bytes(key[:8], "little")


def hashes_of(keys: Iterable[bytes]) -> tuple[int, ...]:
    """:func:`hash_of` of each."""
    return tuple([number for (number,) in _HASH.iter_unpack(b"".join(keys))])


class BlockNames:
    """Names the blocks of one model: two engines give a block the same key exactly when they have the same card and
    weights (EngineInfo's), and the sequences the same salt, LoRA and token ids up to the block's end.

    A key is BLAKE2b-128 (RFC 7693) of the key before it and the block's ids, personalised by the model; the chain
    starts from salt and LoRA, keyed by the model.  With a weaker hash a tenant could look for a collision and have one
    prompt served with another's KV.
    """

    def __init__(self, card: bytes, weights: str, block_size: int) -> None:
        self._model = blake2b(blake2b(card).digest() + weights.encode(), digest_size=KEY_BYTES).digest()
        self._start = blake2b(digest_size=KEY_BYTES, person=self._model).copy
        self._plain = self._root("", "")
        self._block_bytes = 4 * block_size

    def chain(self, salt: str, lora: str) -> KeyChain:
        """For the blocks of one sequence."""
        return KeyChain(self._start, self._root(salt, lora) if salt or lora else self._plain, self._block_bytes)

    def _root(self, salt: str, lora: str) -> bytes:
        name, adapter = salt.encode(), lora.encode()
        both = _SIZES.pack(len(name), len(adapter)) + name + adapter
        return blake2b(both, digest_size=KEY_BYTES, key=self._model).digest()


class KeyChain:
    """The ``keys`` of a sequence's full blocks, in order."""

    __slots__ = ("_block_bytes", "_root", "_start", "keys")

    def __init__(self, start: Callable[[], blake2b], root: bytes, block_bytes: int) -> None:
        self._start = start  # a copy costs half of what a new hash object does
        self._root = root
        self._block_bytes = block_bytes
        self.keys: list[bytes] = []

    def extend(self, data: bytes) -> None:
        """Go on with the token ids (u32 as in an array) behind the last block; a rest that fills none is left out."""
        start, add, size = self._start, self.keys.append, self._block_bytes
        key = self.keys[-1] if self.keys else self._root
        for stop in range(size, len(data) + 1, size):
            state = start()
            state.update(key + data[stop - size : stop])
            key = state.digest()
            add(key)
