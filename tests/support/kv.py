"""A worker's cache as an engine would tell of it, with what it truly holds worked out the slow way."""

from __future__ import annotations

import random
from array import array
from functools import lru_cache

from p2pdyn.core.kvhash import root_seed, sequence_hashes
from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent

BLOCK = 2
"""Tokens a block."""


@lru_cache(100_000)
def sequence_hash(tokens: tuple[int, ...], salt: str = "") -> int:
    """Of the whole of ``tokens``."""
    return sequence_hashes(array("I", tokens).tobytes(), BLOCK, root_seed(salt=salt))[-1]


class Cache:
    """Blocks by engine id: the tokens of the whole prefix, the salt, and copies a tier.

    Tokens are few, so that other ids and other workers have the same content.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.content: dict[int, tuple[tuple[int, ...], str]] = {}
        self.copies: dict[tuple[int, int], int] = {}
        self.last_id = 0

    def truth(self) -> set[tuple[int, int]]:
        """Each (sequence hash, tier) in cache."""
        return {(sequence_hash(*self.content[block]), tier) for block, tier in self.copies}

    def store(self) -> KvEvent:
        """A few blocks at the start of a sequence or behind a known one."""
        held = sorted({block for block, _ in self.copies})
        parent = self.rng.choice([None, *held])
        prefix, salt = ((), self.rng.choice(("", "", "salt"))) if parent is None else self.content[parent]
        tier = self.rng.choice((0, 0, 0, 1, 2))
        blocks, added = [], []
        for _ in range(self.rng.randint(1, 4)):
            added += [self.rng.randint(1, 2) for _ in range(BLOCK)]
            self.last_id += 1
            blocks.append(self.last_id)
            self.content[self.last_id] = ((*prefix, *added), salt)
            self.copies[self.last_id, tier] = 1
        return BlocksStored(tuple(blocks), parent, tuple(added), salt=salt, tier=tier)

    def copy(self) -> KvEvent | None:
        """A block that is there once more, in the same tier or another."""
        held = sorted({block for block, _ in self.copies})
        if not held:
            return None
        block, tier = self.rng.choice(held), self.rng.choice((0, 1, 2))
        tokens, salt = self.content[block]
        parents = [one for one in held if self.content[one] == (tokens[:-BLOCK], salt)]
        if len(tokens) > BLOCK and not parents:
            return None
        self.copies[block, tier] = self.copies.get((block, tier), 0) + 1
        parent = parents[0] if len(tokens) > BLOCK else None
        return BlocksStored((block,), parent, tokens[-BLOCK:], salt=salt, tier=tier)

    def remove(self) -> KvEvent | None:
        """Some blocks of one tier, and one that was never there."""
        tier = self.rng.choice((0, 1, 2))
        held = sorted(block for block, where in self.copies if where == tier)
        if not held:
            return None
        gone = self.rng.sample(held, self.rng.randint(1, min(3, len(held))))
        for block in gone:
            self.copies[block, tier] -= 1
            if not self.copies[block, tier]:
                del self.copies[block, tier]
        return BlocksRemoved((*gone, 10**9), tier)

    def clear(self) -> KvEvent:
        self.copies.clear()
        return BlocksCleared()

    def step(self) -> list[KvEvent]:
        """What one engine step did."""
        events: list[KvEvent] = []
        for _ in range(self.rng.randint(1, 3)):
            act = self.rng.choices((self.store, self.copy, self.remove, self.clear), (8, 3, 8, 1))[0]
            event = act()
            if event is not None:
                events.append(event)
        return events
