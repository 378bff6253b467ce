"""Which sequences compute what in the next step. No model, no clock.

Each step computes one position of every sequence that decodes, then as much of the prompts as the row budget leaves:
first of those begun, then of those that can be admitted, lowest ``priority`` value first and in order of arrival.  A
sequence is admitted when there are blocks for all its tokens; when a decoding one finds no block, the last in that
order is put back and computed again later, to the same result.  One that expects blocks from another worker has a
place, and blocks for all its tokens, and computes nothing until they are settled.
"""

from __future__ import annotations

from array import array
from bisect import insort

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import BlocksStored, Sequence, Settle, TransferOrder
from p2pdyn.engines.lending import Lending
from p2pdyn.engines.paged import KeyChain, PagedBlocks, hash_of, hashes_of


class Run:
    """One sequence. ``tokens[:computed]`` are in its blocks; ``keys`` name its full blocks, of which the cache knows
    the first ``registered``. It ends at ``end`` tokens, or with one of ``stops``. With ``pull``, blocks up to that
    index are still to come from another worker."""

    def __init__(self, sequence: Sequence, chain: KeyChain, end: int, stops: tuple[int, ...], seed: int) -> None:
        self.key = sequence.key
        self.tokens: array[int] = sequence.tokens
        self.prompt_len = sequence.prompt_len
        self.params: SamplingParams = sequence.params
        self.end = end
        self.stops = stops
        self.seed = seed
        self.hand_over = sequence.hand_over
        self.pull = sequence.pull
        self.chain = chain
        self.keys = chain.keys
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
        if full > len(self.keys):
            self.chain.extend(self.tokens[len(self.keys) * size : full * size].tobytes())


class Scheduler:
    """Sequences waiting and running over one pool of blocks."""

    def __init__(
        self, cache: PagedBlocks, lending: Lending, block_size: int, max_num_seqs: int, max_batch_tokens: int
    ) -> None:
        self.cache = cache
        self.lending = lending
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.waiting: list[Run] = []
        self.running: list[Run] = []
        self._runs: dict[int, Run] = {}
        self._submitted = 0
        self._stuck = False  # nothing can be computed before others give blocks back, or fill them

    @property
    def backlog(self) -> int:
        """Prompt tokens that wait to be computed here."""
        size, runs = self.block_size, [*self.waiting, *(run for run in self.running if run.rest > 1)]
        return sum(len(run.tokens) - max(run.computed, run.pull * size) for run in runs)

    @property
    def due(self) -> bool:
        """:meth:`plan` may find something to compute."""
        return bool(self.waiting or self.running) and not self._stuck

    def submit(self, run: Run) -> None:
        self._submitted += 1
        run.order = (run.params.priority, self._submitted)
        full = (len(run.tokens) - 1) // self.block_size
        run.name(full, self.block_size)
        if run.pull and not full:
            self.lending.reserve(run.key, (), (), 0, 0)
        run.pull = min(run.pull, full)
        self._stuck = False
        self._runs[run.key] = run
        insort(self.waiting, run, key=_order)

    def end(self, key: int) -> None:
        """Forget a sequence, wherever it is; its full blocks stay cached."""
        run = self._runs.pop(key, None)
        if run is None:
            return
        (self.running if run.admitted else self.waiting).remove(run)
        self._release(run)
        self._stuck = False

    def transfer(self, order: TransferOrder) -> None:
        """See :meth:`p2pdyn.engines.base.Engine.transfer`."""
        self._stuck = False
        self.lending.carry_out(order, self._settle)

    def plan(self) -> list[tuple[Run, int]]:
        """What to compute next: (run, up to which token), each at most once."""
        for run in sorted(self.running, key=_order):
            if run.admitted and run.computed == len(run.blocks) * self.block_size:
                self._extend(run)
        chunks = [(run, len(run.tokens)) for run in self.running if run.rest == 1]
        budget = max(1, self.max_batch_tokens - len(chunks))
        for run in [run for run in self.running if run.rest > 1 and not run.pull]:
            size = min(run.rest, budget)
            if size:
                chunks.append((run, run.computed + size))
                budget -= size
        while budget and self.waiting and len(self.running) < self.max_num_seqs and self._admit(self.waiting[0]):
            run = self.running[-1]
            if not run.pull:
                size = min(run.rest, budget)
                chunks.append((run, run.computed + size))
                budget -= size
        self._stuck = not chunks
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

    def hand_over(self, run: Run) -> None:
        """It is computed: others read its full blocks from here on, but that of the last token, which they compute."""
        full = (len(run.tokens) - 1) // self.block_size
        blocks, run.blocks = run.blocks[:full], run.blocks[full:]
        self.end(run.key)
        self.lending.hold(run.key, blocks, run.keys[:full], run.cached)

    def close(self) -> None:
        """Forget everything."""
        for key in list(self._runs):
            self.end(key)
        self.lending.close()

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self.cache.check([*(run.blocks for run in self.running), *self.lending.blocks()])
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
        if run.pull:
            run.pull = self.lending.reserve(run.key, run.blocks, run.keys, run.registered, run.pull)
        return True

    def _settle(self, order: Settle) -> bool:
        """The reserved blocks are filled, or not; if something may still write into them, others must be found. False:
        the sequence is gone."""
        run = self._runs.get(order.key)
        if run is None:
            return False
        if not (run.pull and run.admitted):
            return True
        if order.over:
            filled, run.pull = min(run.registered + order.filled, run.pull), 0
            run.cached = min(filled * self.block_size, run.prompt_len)
            self.computed(run, filled * self.block_size)
        else:
            self.running.remove(run)
            self._release(run)
            run.pull = 0
            insort(self.waiting, run, key=_order)
        return True

    def _extend(self, run: Run) -> None:
        """Give a decoding run its next block, or put runs back until there is one; itself at last."""
        while not self.cache.available:
            last = max((other for other in self.running if not other.pull), key=_order)
            self.running.remove(last)
            self._release(last)
            insort(self.waiting, last, key=_order)
            if last is run:
                return
        run.blocks.append(self.cache.allocate())

    def _release(self, run: Run) -> None:
        if run.pull and run.admitted:
            self.lending.leave(run.key, run.blocks[run.registered : run.pull])
            del run.blocks[run.registered : run.pull]
        self.cache.release(reversed(run.blocks))
        run.blocks, run.computed, run.registered, run.admitted = [], 0, 0, False


def _order(run: Run) -> tuple[int, int]:
    return run.order
