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

import sys
from array import array
from collections.abc import Iterable

from p2pdyn.core.kvhash import block_hashes, chain, root_seed
from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from p2pdyn.wire.kvpack import CLEARED, REMOVED, STORED, TIERS, Op

MAX_IDS = 2**22
"""Ids known at once; more are left out like orphans."""


class KvBlocks:
    """``orphans`` counts the stored blocks that were left out: unknown parent, tokens that do not fit, too many."""

    def __init__(self, block_size: int, max_ids: int = MAX_IDS) -> None:
        self.orphans = 0
        self._block_size = block_size
        self._max_ids = max_ids
        self._names: dict[int, int] = {}
        self._copies: tuple[dict[int, int], ...] = tuple({} for _ in range(TIERS))
        self._ids: tuple[dict[int, int], ...] = tuple({} for _ in range(TIERS))

    def __len__(self) -> int:
        return len(self._names)

    def apply(self, event: KvEvent) -> list[Op]:
        """What of (hash, tier) really came or went, in order; empty if nothing did."""
        if isinstance(event, BlocksStored):
            return self._store(event)
        if isinstance(event, BlocksRemoved):
            gone = array("Q")
            if 0 <= event.tier < TIERS:
                for block in event.hashes:
                    self._remove(block, event.tier, gone)
            return [Op(REMOVED, event.tier, gone)] if gone else []
        return self._clear(event)

    def held(self, tier: int) -> Iterable[int]:
        """The hashes in ``tier``."""
        return self._ids[tier].keys()

    def _store(self, event: BlocksStored) -> list[Op]:
        names = self._name(event) if 0 <= event.tier < TIERS else None
        if names is None:
            self.orphans += len(event.hashes)
            return []
        copies, ids = self._copies[event.tier], self._ids[event.tier]
        ops: list[Op] = []
        fresh = array("Q")
        for block, name in zip(event.hashes, names, strict=True):
            known = self._names.get(block)
            if known is None:
                if len(self._names) >= self._max_ids:
                    self.orphans += 1
                    continue
                self._names[block] = name
            elif known != name:
                if fresh:
                    ops.append(Op(STORED, event.tier, fresh))
                    fresh = array("Q")
                ops += self._forget(block)
                self._names[block] = name
            before = copies.get(block, 0)
            copies[block] = before + 1
            if not before:
                others = ids.get(name, 0)
                ids[name] = others + 1
                if not others:
                    fresh.append(name)
        return [*ops, Op(STORED, event.tier, fresh)] if fresh else ops

    def _name(self, event: BlocksStored) -> list[int] | None:
        """The blocks' sequence hashes, or None if they cannot be known."""
        if len(event.tokens) != len(event.hashes) * self._block_size:
            return None
        try:
            tokens = array("I", event.tokens)
        except (OverflowError, TypeError):
            return None
        if sys.byteorder == "big":
            tokens.byteswap()
        if event.parent is None:
            return chain(None, block_hashes(tokens.tobytes(), self._block_size, root_seed(event.lora, event.salt)))
        parent = self._names.get(event.parent)
        return None if parent is None else chain(parent, block_hashes(tokens.tobytes(), self._block_size))

    def _remove(self, block: int, tier: int, gone: array[int]) -> None:
        """Take one copy of ``block``; its hash is added to ``gone`` if that was the last of its content."""
        copies, ids = self._copies[tier], self._ids[tier]
        left = copies.get(block, 0) - 1
        if left > 0:
            copies[block] = left
        elif left == 0:
            del copies[block]
            name = self._names[block]
            ids[name] -= 1
            if not ids[name]:
                del ids[name]
                gone.append(name)
            if not any(block in others for others in self._copies):
                del self._names[block]

    def _forget(self, block: int) -> list[Op]:
        """Take all copies of ``block``, in every tier."""
        ops = []
        for tier, copies in enumerate(self._copies):
            gone = array("Q")
            if block in copies:
                copies[block] = 1
                self._remove(block, tier, gone)
            if gone:
                ops.append(Op(REMOVED, tier, gone))
        return ops

    def _clear(self, _: BlocksCleared) -> list[Op]:
        if not self._names:
            return []
        for known in (self._names, *self._copies, *self._ids):
            known.clear()
        return [Op(CLEARED, 0, array("Q"))]
