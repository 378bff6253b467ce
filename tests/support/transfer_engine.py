"""An engine's KV memory, for the tests of transfers: what is in each block, who refers to it, what is told."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from p2pdyn.engines.base import Held, Pin, Release, Reserved, Settle

BLOCKS = 14
"""Of each engine: few, so that they are fought over."""
BLOCK_BYTES = 50_000_000
"""A block adds a second to the longest read."""
DEPTH = 4


def prompt_keys(prompt: int, depth: int) -> tuple[bytes, ...]:
    """Prompts 2n and 2n + 1 have their first block in common."""
    names = [f"{prompt // 2}-both" if i == 0 else f"{prompt}-{i}" for i in range(depth)]
    return tuple(name.encode().ljust(8, b".") * 2 for name in names)


@dataclass
class Waiting:
    """A sequence with a pull, in the engine's queue."""

    key: int
    keys: tuple[bytes, ...]


@dataclass
class Reservation:
    keys: tuple[bytes, ...]
    cached: list[int]
    blocks: tuple[int, ...]
    aborted: bool = False


class Engine:
    """``content`` of a block is the key whose bytes it has. AssertionError at an order that no engine may get."""

    def __init__(self, epoch: int, rng: random.Random, tell: Callable[[Held | Reserved], object]) -> None:
        self.epoch = epoch
        self.rng = rng
        self.tell = tell
        self.dead = False
        self.content: list[bytes] = [b"?"] * BLOCKS
        self.tags: list[tuple[bytes, int, int] | None] = [None] * BLOCKS
        self.uses = [0] * BLOCKS
        self.refs = [0] * BLOCKS
        self.cached: dict[bytes, int] = {}
        self.queue: deque[Waiting] = deque()
        self.orders: deque[Pin | Release | Settle] = deque()
        self.held: dict[int, tuple[int, ...]] = {}
        self.reserved: dict[int, Reservation] = {}
        self.limbo: dict[int, tuple[int, ...]] = {}
        """Blocks of a Settle that was not over."""
        self.filled = 0
        self.released: list[int] = []
        """Blocks of leases that the last step let go of."""

    # Blocks

    def free(self) -> list[int]:
        return [block for block, refs in enumerate(self.refs) if not refs]

    def take(self, count: int) -> list[int] | None:
        free = self.free()
        if len(free) < count:
            return None
        taken = self.rng.sample(free, count)
        for block in taken:
            self.reuse(block, b"empty")
            self.refs[block] = 1
        return taken

    def reuse(self, block: int, content: bytes) -> None:
        """The tag goes before the bytes change."""
        assert not self.refs[block]
        self.cached = {key: one for key, one in self.cached.items() if one != block}
        self.tags[block] = None
        self.uses[block] += 1
        self.content[block] = content

    def churn(self, share: float) -> None:
        """Other prompts come by and write over whatever nobody holds."""
        for block in self.free():
            if self.rng.random() < share:
                self.reuse(block, b"another prompt's")

    def run(self, keys: Sequence[bytes]) -> list[int]:
        found = []
        for key in keys:
            if key not in self.cached:
                break
            found.append(self.cached[key])
        return found

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.refs[block] += 1

    def let_go(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.refs[block] -= 1
            assert self.refs[block] >= 0

    def prefill(self, keys: Sequence[bytes]) -> list[int] | None:
        """Compute what is not cached; the blocks are referred to."""
        found = self.run(keys)
        self.hold(found)
        fresh = self.take(len(keys) - len(found))
        if fresh is None:
            self.let_go(found)
            return None
        for block, key in zip(fresh, keys[len(found) :], strict=True):
            self.content[block] = key
            self.cached.setdefault(key, block)
        return found + fresh

    # What it does

    def serve(self, keys: Sequence[bytes]) -> None:
        """Somebody's prompt, computed and gone."""
        blocks = None if self.dead else self.prefill(keys)
        if blocks is not None:
            self.let_go(blocks)

    def hand_over(self, key: int, keys: tuple[bytes, ...]) -> None:
        blocks = self.prefill(keys)
        if blocks is not None:
            self._hold(key, keys, blocks)

    def _hold(self, key: int, keys: tuple[bytes, ...], blocks: Sequence[int]) -> None:
        for one, block in zip(keys, blocks, strict=True):
            self.tags[block] = (one[:8], self.epoch, self.uses[block])
        assert key not in self.held
        self.held[key] = tuple(blocks)
        self.tell(Held(key, tuple(blocks), tuple(self.uses[block] for block in blocks), keys))

    def step(self) -> None:
        self.released = []
        if self.dead:
            return
        while self.orders:
            order = self.orders.popleft()
            match order:
                case Pin():
                    found = self.run(order.keys)
                    self.hold(found)
                    self._hold(order.key, order.keys[: len(found)], found)
                case Release():
                    self._release(order.key)
                case Settle():
                    self._settle(order)
        while self.queue and self._reserve(self.queue[0]):
            self.queue.popleft()

    def _reserve(self, waiting: Waiting) -> bool:
        found = self.run(waiting.keys)
        self.hold(found)
        fresh = self.take(len(waiting.keys) - len(found))
        if fresh is None:
            self.let_go(found)
            return False
        note = Reserved(waiting.key, len(found), tuple(fresh), waiting.keys[len(found) :])
        if fresh:
            self.reserved[waiting.key] = Reservation(note.keys, found, note.blocks)
        else:
            self.let_go(found)
        self.tell(note)
        return True

    def abort(self, key: int) -> None:
        self.queue = deque(one for one in self.queue if one.key != key)
        if key in self.reserved:
            self.reserved[key].aborted = True

    def _release(self, key: int) -> None:
        assert (key in self.held) != (key in self.limbo), f"Release of {key}, which is not held"
        if key in self.held:
            blocks = self.held.pop(key)
            self.released += blocks
        else:
            blocks = self.limbo.pop(key)
        self.let_go(blocks)

    def _settle(self, order: Settle) -> None:
        assert order.key in self.reserved, f"Settle of {order.key}, which is not reserved"
        note = self.reserved.pop(order.key)
        self.let_go(note.cached)
        if not order.over:
            assert not order.filled
            self.limbo[order.key] = note.blocks
            return
        found = [self.content[block] for block in note.blocks[: order.filled]]
        assert found == list(note.keys[: order.filled]), f"filled with what is not theirs: {found} for {note.keys}"
        self.filled += order.filled
        usable = len(note.blocks) if not note.aborted else order.filled
        for block, key in zip(note.blocks[:usable], note.keys, strict=False):  # the rest is computed
            self.content[block] = key
            self.cached.setdefault(key, block)
        self.let_go(note.blocks)

    def check(self) -> None:
        wrong = {key: self.content[block] for key, block in self.cached.items() if self.content[block] != key}
        assert not wrong, f"the cache has another prompt's bytes: {wrong}"
        refs = Counter[int]()
        for blocks in (*self.held.values(), *self.limbo.values()):
            refs.update(blocks)
        for note in self.reserved.values():
            refs.update((*note.cached, *note.blocks))
        assert [refs[block] for block in range(BLOCKS)] == self.refs
