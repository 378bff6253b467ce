"""Which sequences compute what in the next step. No model, no clock.

Each step computes one position of every sequence that decodes, then as much of the prompts as the row budget leaves:
first of those begun, then of those that can be admitted, lowest ``priority`` value first and in order of arrival.  A
sequence is admitted when there are blocks for all its tokens; when a decoding one finds no block, the last in that
order is put back and computed again later, to the same result.
"""

from __future__ import annotations

from array import array
from bisect import insort

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import BlocksStored, Sequence
from p2pdyn.engines.paged import PagedBlocks, hash_of, hashes_of, next_key, root_key


class Run:
    """One sequence. ``tokens[:computed]`` are in its blocks; ``keys`` name its full blocks, of which the cache knows
    the first ``registered``. It ends at ``end`` tokens, or with one of ``stops``."""

    def __init__(self, sequence: Sequence, end: int, stops: tuple[int, ...], seed: int) -> None:
        self.key = sequence.key
        self.tokens: array[int] = sequence.tokens
        self.prompt_len = sequence.prompt_len
        self.params: SamplingParams = sequence.params
        self.end = end
        self.stops = stops
        self.seed = seed
        self.root = root_key(sequence.params.cache_salt, sequence.params.lora)
        self.keys: list[bytes] = []
        self.blocks: list[int] = []
        self.computed = 0
        self.registered = 0
        self.cached = 0
        self.admitted = False
        self.order = (0, 0)

    @property
    def rest(self) -> int:
        """Positions to compute before the next token: 1 while decoding."""
        return len(self.tokens) - self.computed

    def name(self, full: int, size: int) -> None:
        """Bring ``keys`` up to ``full`` blocks."""
        for index in range(len(self.keys), full):
            block = self.tokens[index * size : (index + 1) * size].tobytes()
            self.keys.append(next_key(self.keys[-1] if index else self.root, block))


class Scheduler:
    """Sequences waiting and running over one pool of blocks."""

    def __init__(self, cache: PagedBlocks, block_size: int, max_num_seqs: int, max_batch_tokens: int) -> None:
        self.cache = cache
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.waiting: list[Run] = []
        self.running: list[Run] = []
        self._runs: dict[int, Run] = {}
        self._submitted = 0

    @property
    def backlog(self) -> int:
        """Prompt tokens that wait to be computed."""
        return sum(run.rest for run in self.waiting) + sum(run.rest for run in self.running if run.rest > 1)

    def submit(self, run: Run) -> None:
        self._submitted += 1
        run.order = (run.params.priority, self._submitted)
        run.name((len(run.tokens) - 1) // self.block_size, self.block_size)
        self._runs[run.key] = run
        insort(self.waiting, run, key=_order)

    def end(self, key: int) -> None:
        """Forget a sequence, wherever it is; its full blocks stay cached."""
        run = self._runs.pop(key, None)
        if run is None:
            return
        (self.running if run.admitted else self.waiting).remove(run)
        self._release(run)

    def plan(self) -> list[tuple[Run, int]]:
        """What to compute next: (run, up to which token), each at most once."""
        for run in sorted(self.running, key=_order):
            if run.admitted and run.computed == len(run.blocks) * self.block_size:
                self._extend(run)
        chunks = [(run, len(run.tokens)) for run in self.running if run.rest == 1]
        budget = max(1, self.max_batch_tokens - len(chunks))
        for run in [run for run in self.running if run.rest > 1]:
            size = min(run.rest, budget)
            if size:
                chunks.append((run, run.computed + size))
                budget -= size
        while budget and self.waiting and len(self.running) < self.max_num_seqs and self._admit(self.waiting[0]):
            run = self.running[-1]
            size = min(run.rest, budget)
            chunks.append((run, run.computed + size))
            budget -= size
        return chunks

    def computed(self, run: Run, upto: int) -> None:
        """Note that ``tokens[:upto]`` are in the blocks, and make the full ones reusable."""
        run.computed = upto
        size, known, full = self.block_size, run.registered, upto // self.block_size
        run.name(full, size)
        new = self.cache.register(run.blocks, run.keys, known, full)
        run.registered = full
        if new < full:
            self.cache.stored(
                BlocksStored(
                    hashes_of(run.keys[new:full]),
                    hash_of(run.keys[new - 1]) if new else None,
                    tuple(run.tokens[new * size : full * size]),
                    run.params.cache_salt,
                    run.params.lora,
                )
            )

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self.cache.check([run.blocks for run in self.running])
        assert all(run.admitted for run in self.running)
        assert not any(run.admitted or run.blocks for run in self.waiting)
        assert len(self._runs) == len(self.running) + len(self.waiting)

    def _admit(self, run: Run) -> bool:
        size = self.block_size
        got = self.cache.reuse(run.keys[: (len(run.tokens) - 1) // size], -(-len(run.tokens) // size))
        if got is None:
            return False
        run.blocks, run.registered = got
        run.computed = run.registered * size
        if not run.cached:
            run.cached = min(run.computed, run.prompt_len)
        run.admitted = True
        self.waiting.remove(run)
        self.running.append(run)
        return True

    def _extend(self, run: Run) -> None:
        """Give a decoding run its next block, or put runs back until there is one; itself at last."""
        while not self.cache.available:
            last = max(self.running, key=_order)
            self.running.remove(last)
            self._release(last)
            insort(self.waiting, last, key=_order)
            if last is run:
                return
        run.blocks.append(self.cache.allocate())

    def _release(self, run: Run) -> None:
        self.cache.release(reversed(run.blocks))
        run.blocks, run.computed, run.registered, run.admitted = [], 0, 0, False


def _order(run: Run) -> tuple[int, int]:
    return run.order
