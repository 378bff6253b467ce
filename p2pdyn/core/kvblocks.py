"""An engine's block ids to sequence hashes, for one data-parallel rank.

Engines name blocks by ids of their own, which mean nothing outside their process (docs/design/kv-hash.md), so the hash
is computed from the tokens in the event and the id only remembered.  Rules:

* An id stored n times in a tier is n copies of the block: it leaves with the n-th removal (vLLM caches a block that two
  requests computed at once twice, and tells of each copy).
* A hash is in a tier as long as an id of that content is: only then is there an op to tell.
* A block whose parent is unknown cannot be named, nor can those behind it: they are left out and counted.
* An id that comes with other content names that from now on; what it named before is gone.
* Removal of what is not there is nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from p2pdyn.core.kvhash import block_hashes, chain, root_seed
from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from p2pdyn.wire.kvpack import CLEARED, REMOVED, STORED, TIERS, Op, little

MAX_IDS = 2**22
"""Ids known at once; more are left out like orphans."""


class KvBlocks:
    """``orphans`` counts the stored blocks that were left out: unknown parent, tokens that do not fit, too many.

    Most blocks are there once, under one id, so that what is counted is what is there more often: ``_copies`` are an
    id's beyond the first, ``_ids`` a hash's ids beyond the first.
    """

    def __init__(self, block_size: int, max_ids: int = MAX_IDS) -> None:
        self.orphans = 0
        self._block_size = block_size
        self._max_ids = max_ids
        self._count = 0
        self._names: tuple[dict[int, int], ...] = tuple({} for _ in range(TIERS))
        self._held: tuple[set[int], ...] = tuple(set() for _ in range(TIERS))
        self._copies: tuple[dict[int, int], ...] = tuple({} for _ in range(TIERS))
        self._ids: tuple[dict[int, int], ...] = tuple({} for _ in range(TIERS))

    def __len__(self) -> int:
        """Ids, in any tier."""
        return self._count

    def apply(self, event: KvEvent) -> list[Op]:
        """What of (hash, tier) really came or went, in order; empty if nothing did."""
        if isinstance(event, BlocksStored):
            return self._store(event)
        if isinstance(event, BlocksRemoved):
            gone = self._remove(event.hashes, event.tier) if 0 <= event.tier < TIERS else []
            return [Op(REMOVED, event.tier, array("Q", gone))] if gone else []
        return self._clear(event)

    def held(self, tier: int) -> AbstractSet[int]:
        """The hashes in ``tier``."""
        return self._held[tier]

    def _name_of(self, block: int) -> int | None:
        for names in self._names:
            if (name := names.get(block)) is not None:
                return name
        return None

    def _store(self, event: BlocksStored) -> list[Op]:
        tier, blocks = event.tier, event.hashes
        hashes = self._hashes(event) if 0 <= tier < TIERS else None
        if hashes is None:
            self.orphans += len(blocks)
            return []
        held, count = self._held[tier], len(blocks)
        if (
            self._count + count <= self._max_ids
            and len(set(blocks)) == count == len(set(hashes))
            and held.isdisjoint(hashes)
            and all(names.keys().isdisjoint(blocks) for names in self._names if names)
        ):
            self._names[tier].update(zip(blocks, hashes, strict=True))
            held.update(hashes)
            self._count += count
            return [Op(STORED, tier, array("Q", hashes))] if hashes else []
        return self._store_each(blocks, hashes, tier)

    def _store_each(self, blocks: tuple[int, ...], hashes: list[int], tier: int) -> list[Op]:
        """Any of them may be there already, in this tier or another, once or twice."""
        names, held, copies, ids = self._names[tier], self._held[tier], self._copies[tier], self._ids[tier]
        ops: list[Op] = []
        fresh = array("Q")
        for block, name in zip(blocks, hashes, strict=True):
            known = self._name_of(block)
            if known is not None and known != name:
                if fresh:
                    ops.append(Op(STORED, tier, fresh))
                    fresh = array("Q")
                ops += self._forget(block)
                known = None
            if known is None:
                if self._count >= self._max_ids:
                    self.orphans += 1
                    continue
                self._count += 1
            if block in names:
                copies[block] = copies.get(block, 0) + 1
                continue
            names[block] = name
            if name in held:
                ids[name] = ids.get(name, 0) + 1
            else:
                held.add(name)
                fresh.append(name)
        return [*ops, Op(STORED, tier, fresh)] if fresh else ops

    def _hashes(self, event: BlocksStored) -> list[int] | None:
        """The blocks' sequence hashes, or None if they cannot be known."""
        if len(event.tokens) != len(event.hashes) * self._block_size:
            return None
        try:
            tokens = little(array("I", event.tokens)).tobytes()
        except (OverflowError, TypeError):
            return None
        if event.parent is None:
            return chain(None, block_hashes(tokens, self._block_size, root_seed(event.lora, event.salt)))
        parent = self._name_of(event.parent)
        return None if parent is None else chain(parent, block_hashes(tokens, self._block_size))

    def _remove(self, blocks: Iterable[int], tier: int) -> list[int]:
        """Take one copy of each of ``blocks``; the hashes of which that was the last."""
        names, held, copies, ids = self._names[tier], self._held[tier], self._copies[tier], self._ids[tier]
        if not copies and not ids and not any(other for other in self._names if other is not names):
            gone = [name for block in blocks if (name := names.pop(block, None)) is not None]
            held.difference_update(gone)
            self._count = len(names)
            return gone
        left: list[int] = []  # the ids that left this tier, and what they named
        gone = []
        for block in blocks:
            if copies and block in copies:
                _take(copies, block)
            elif (name := names.pop(block, None)) is not None:
                left.append(block)
                if ids and name in ids:
                    _take(ids, name)
                else:
                    gone.append(name)
        held.difference_update(gone)
        for other in self._names:
            if other and other is not names:
                left = [block for block in left if block not in other]
        self._count -= len(left)
        return gone

    def _forget(self, block: int) -> list[Op]:
        """Take all copies of ``block``, in every tier."""
        ops = []
        for tier, copies in enumerate(self._copies):
            copies.pop(block, None)
            if gone := self._remove((block,), tier):
                ops.append(Op(REMOVED, tier, array("Q", gone)))
        return ops

    def _clear(self, _: BlocksCleared) -> list[Op]:
        if not self._count:
            return []
        for known in (*self._names, *self._copies, *self._ids):
            known.clear()
        for held in self._held:
            held.clear()
        self._count = 0
        return [Op(CLEARED, 0, array("Q"))]


def _take(counts: dict[int, int], key: int) -> None:
    if counts[key] == 1:
        del counts[key]
    else:
        counts[key] -= 1
