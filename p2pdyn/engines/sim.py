"""`sim`: an engine without a model, for tests, benchmarks and capacity planning.

Everything but the arithmetic is real: continuous batching, chunked prefill, a paged KV cache of real bytes with prefix
reuse, preemption by recomputing, KV events.  A block's bytes are a digest of the block before it and its own tokens;
each token is chosen by a hash over the bytes of all of the sequence's blocks, read anew at each step.  So a wrong,
stale or unwritten block changes the text, while the token at a position depends on nothing but the ids before it, the
parameters and the seed: not on where the prompt ends, on the batch, or on which blocks hold it.

A step takes ``prefill tokens / prefill_tps``, and ``itl`` on top if any sequence decodes.  Cost of a step without
waiting, at 250-token prompts: docs/design/engine-host.md.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from itertools import chain
from pathlib import Path

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from p2pdyn import __version__
from p2pdyn.core.types import Load, SamplingParams
from p2pdyn.engines import sim_model
from p2pdyn.engines.base import (
    BlocksStored,
    EngineInfo,
    EngineOptions,
    Output,
    Progress,
    Sequence,
    Settle,
    Step,
    TransferOrder,
)
from p2pdyn.engines.lending import Lending
from p2pdyn.engines.paged import BlockNames, KeyChain, PagedBlocks, hash_of, hashes_of
from p2pdyn.engines.sim_args import SimArgs
from p2pdyn.engines.sim_cache import KvPool
from p2pdyn.engines.sim_model import FEATURES
from p2pdyn.engines.sim_text import Careful, Row, Vocabulary, draw, odds

U64 = 2**64 - 1


def create(options: EngineOptions) -> SimEngine:
    """The registry's entry."""
    return SimEngine(options, SimArgs.parse(options.args))


class Run:
    """One sequence. ``tokens[:computed]`` are in its blocks: ``spans`` are their bytes, ``last`` the last one's.
    ``keys`` name the full blocks of its tokens; the cache knows the first ``registered`` of them. With ``pull``, blocks
    up to that index are still to come from another worker."""

    __slots__ = (
        "admitted", "blocks", "cached", "careful", "chain", "computed", "end", "hand_over", "key", "keys", "last",
        "odds", "params", "prompt_len", "pull", "registered", "root", "seed", "spans", "stop", "tail", "tokens",
    )  # fmt: skip

    def __init__(
        self, sequence: Sequence, root: bytes, chain: KeyChain, end: int, seed: int, careful: Careful | None
    ) -> None:
        self.key = sequence.key
        self.tokens = sequence.tokens
        self.prompt_len = sequence.prompt_len
        self.params = params = sequence.params
        self.hand_over = sequence.hand_over
        self.pull = 0
        self.root = root
        self.end = end
        self.seed = seed
        self.careful = careful
        self.odds = odds(params.temperature, params.top_k, params.top_p, params.min_p)
        self.stop = frozenset(params.stop_token_ids)
        self.chain = chain
        self.keys = chain.keys
        self.cached = 0
        self.admitted = 0
        self.reset()

    def reset(self) -> None:
        """Forget all that was computed."""
        self.blocks: list[int] = []
        self.spans: list[memoryview] = []
        self.last = memoryview(b"")
        self.computed = 0
        self.registered = 0
        self.tail = self.root
        """What the last written block's bytes are a digest of."""


class SimEngine:
    """See :class:`p2pdyn.engines.base.Engine`. A sequence is waiting, then prefilling, then decoding. With ``pull`` it
    is among the prefilling, and holds its place and blocks, but computes nothing before its blocks are settled.

    With ``--speedup 0`` a step is due at once and is planned when it runs; else it is planned when the one before it
    ends, and runs at its due time.
    """

    def __init__(self, options: EngineOptions, args: SimArgs) -> None:
        model, served_name = options.model, options.served_name
        self.args = args
        self.cache = PagedBlocks(args.kv_blocks)
        self.pool = KvPool(args.kv_blocks, args.kv_bytes_per_block, options.kv_memory)
        self.memory: memoryview | None = self.pool.data
        self.lending = Lending(self.cache, options.epoch)
        self.lending.tags = self.pool.tags
        self._context = min(args.context, args.kv_blocks * args.block_size)
        self._model = model
        self._name = served_name or (Path(model).resolve().name if model else "sim")
        self._vocabulary: Vocabulary | None = None
        self._names: BlockNames | None = None
        self._waiting: OrderedDict[int, Run] = OrderedDict()
        self._prefilling: dict[int, Run] = {}
        self._decoding: dict[int, Run] = {}
        self._instant: list[Output] = []
        self._chunks: list[tuple[Run, int]] = []  # of the planned step: (prefilling, up to which token)
        self._due: float | None = None  # of the planned step
        self._stuck = False  # nothing can be computed before others give blocks back, or fill them
        self._backlog = 0  # tokens to prefill
        self._admissions = 0
        self._random = random.Random()

    # ---- Engine

    def load(self, progress: Progress) -> EngineInfo:
        progress(0.0, "reading the tokenizer")
        card, self._vocabulary = sim_model.read(self._model, self._context)
        weights = f"seed {self.args.seed}, {self.args.kv_bytes_per_block} bytes a block"
        self._names = BlockNames(card, weights, self.args.block_size)
        progress(1.0, "ready")
        return EngineInfo(
            "sim",
            __version__,
            self._name,
            card,
            self.args.block_size,
            self.args.kv_blocks,
            self.args.max_num_seqs,
            self._context,
            FEATURES,
            weights,
            block_bytes=self.args.kv_bytes_per_block,
        )

    def submit(self, sequence: Sequence, now: float) -> None:
        params, total = sequence.params, len(sequence.tokens)
        end = min(sequence.prompt_len + params.max_tokens, self._context)
        if not total or sequence.prompt_len >= self._context:
            detail = f"the prompt has {sequence.prompt_len} tokens, but the context is {self._context}: shorten it"
            self._instant.append(Output(sequence.key, (), "invalid", detail=detail if total else "the prompt is empty"))
            return
        if total >= end:
            self._instant.append(Output(sequence.key, (), "length"))
            return
        assert self._vocabulary is not None
        careful = None
        if Careful.wanted(params):
            careful = Careful(self._vocabulary, params, sequence.tokens, sequence.prompt_len)
        seed = self._random.getrandbits(64) if params.seed is None else params.seed & U64
        assert self._names is not None
        chain = self._names.chain(params.cache_salt, params.lora)
        chain.extend(sequence.tokens.tobytes())
        run = Run(sequence, self._root(params), chain, end, seed, careful)
        if sequence.pull:
            run.pull = min(sequence.pull, (total - 1) // self.args.block_size)
            if not run.pull:
                self.lending.reserve(run.key, (), (), 0, 0)
        self._backlog += self._rest(run)
        self._waiting[run.key] = run
        self._stuck = False

    def abort(self, key: int, now: float) -> None:
        run = self._waiting.pop(key, None) or self._prefilling.pop(key, None)
        if run is not None:
            self._backlog -= self._rest(run)
        else:
            run = self._decoding.pop(key, None)
        if run is not None:
            self._free(run)
        elif self._instant:
            self._instant = [output for output in self._instant if output.key != key]
        if not (self._decoding or self._prefilling):
            self._due = None
        self._stuck = False

    def transfer(self, order: TransferOrder, now: float) -> None:
        self._stuck = False
        self.lending.carry_out(order, self._settle)

    def next_step(self, now: float) -> float | None:
        if self._instant or self.lending.waiting:
            return now
        if self._due is not None:
            return self._due
        return now if (self._waiting or self._prefilling or self._decoding) and not self._stuck else None

    def step(self, now: float) -> Step:
        outputs, self._instant = self._instant, []
        if self._due is None:
            self._plan(now, now)
        due = self._due
        if due is not None and due <= now:
            self._due = None
            self._run_step(outputs)
            if self.args.speedup:
                self._plan(due, now)
        return Step(outputs, self.cache.take_events(), self.lending.take_notes())

    def load_report(self) -> Load:
        args, speed = self.args, self.args.speedup or 1.0
        used = self.cache.used
        return Load(
            active_requests=len(self._decoding) + len(self._prefilling),
            active_blocks=used,
            queued=len(self._waiting),
            kv_used=used,
            kv_total=args.kv_blocks,
            prefill_tokens_queued=self._backlog,
            prefill_tps=args.prefill_tps * args.speedup,  # 0: it waits for nothing, so its speed is not known
            itl_ms=args.itl_ms / speed,
        )

    def close(self) -> None:
        for run in (*self._waiting.values(), *self._prefilling.values(), *self._decoding.values()):
            self._free(run)
        for group in (self._waiting, self._prefilling, self._decoding):
            group.clear()
        self.lending.close()
        self._instant, self._due, self._backlog = [], None, 0

    def check(self) -> None:
        """Raise AssertionError if the bookkeeping of blocks is broken."""
        running = chain(self._decoding.values(), self._prefilling.values())
        self.cache.check([*(run.blocks for run in running), *self.lending.blocks()])
        waiting = chain(self._waiting.values(), self._prefilling.values())
        assert self._backlog == sum(self._rest(run) for run in waiting), "the backlog is not what waits"

    # ---- planning

    def _plan(self, start: float, now: float) -> None:
        """Decide what the next step computes, and when it is due if it starts at ``start``."""
        args = self.args
        budget = args.max_batch_tokens - len(self._decoding)
        self._chunks, prefill = [], 0
        for run in self._prefilling.values():
            prefill += self._chunk(run, budget - prefill)
        while self._waiting and prefill < budget and len(self._decoding) + len(self._prefilling) < args.max_num_seqs:
            run = next(iter(self._waiting.values()))
            if not self._admit(run):
                break
            prefill += self._chunk(run, budget - prefill)
        if self._chunks or self._decoding:
            took = prefill / args.prefill_tps + (args.itl_ms / 1000 if self._decoding else 0.0)
            self._due = max(now, start + took / args.speedup) if args.speedup else now
        self._stuck = self._due is None

    def _chunk(self, run: Run, budget: int) -> int:
        size = min(len(run.tokens) - run.computed, budget)
        if size <= 0 or run.pull:
            return 0
        self._chunks.append((run, run.computed + size))
        return size

    def _admit(self, run: Run) -> bool:
        """Give the first waiting sequence all blocks it needs for its tokens, cached ones first; False if it must
        wait.  Its last token is always computed, so that there is something to go on from."""
        total, size = len(run.tokens), self.args.block_size
        got = self.cache.reuse(run.keys[: (total - 1) // size], -(-total // size))
        if got is None:
            return False
        del self._waiting[run.key]
        self._backlog -= self._rest(run)
        run.blocks, run.registered = got
        self._look(run)
        run.computed = run.registered * size
        if run.pull:
            run.pull = self.lending.reserve(run.key, run.blocks, run.keys, run.registered, run.pull)
        self._backlog += self._rest(run)
        if not run.admitted:
            run.cached = min(run.computed, run.prompt_len)
        self._admissions += 1
        run.admitted = self._admissions
        self._prefilling[run.key] = run
        return True

    def _settle(self, order: Settle) -> bool:
        """The reserved blocks are filled, or not; if something may still write into them, others must be found. False:
        the sequence is gone."""
        run = self._prefilling.get(order.key)
        if run is None:
            return False
        if not run.pull:
            return True
        self._backlog -= self._rest(run)
        if order.over:
            filled, run.pull = min(run.registered + order.filled, run.pull), 0
            run.computed = filled * self.args.block_size
            run.cached = min(run.computed, run.prompt_len)
            self._register(run)
        else:
            del self._prefilling[run.key]
            self._free(run)
            run.pull = 0
            self._waiting[run.key] = run
            self._waiting.move_to_end(run.key, last=False)
        self._backlog += self._rest(run)
        return True

    def _rest(self, run: Run) -> int:
        """Tokens to prefill here."""
        return len(run.tokens) - max(run.computed, run.pull * self.args.block_size)

    def _root(self, params: SamplingParams) -> bytes:
        """What a sequence's first block continues: sequences of other seeds, salts or LoRAs share nothing."""
        lora, salt = params.lora.encode(), params.cache_salt.encode()
        return xxh3_128_digest(b"%d %d %b%b" % (self.args.seed, len(lora), lora, salt))

    # ---- running

    def _run_step(self, outputs: list[Output]) -> None:
        decoding = list(self._decoding.values())
        done = [run for run, upto in self._chunks if self._prefill(run, upto)]
        self._chunks = []
        self._append(decoding)
        decoding += done
        self._decoding.update((run.key, run) for run in done)
        size = self.args.block_size
        filled = [run for run in decoding if not run.computed % size]
        self._emit(decoding, outputs)
        for run in filled:
            if self._decoding.get(run.key) is run:  # neither finished nor preempted just now
                self._next_block(run)

    def _prefill(self, run: Run, upto: int) -> bool:
        """Write tokens up to ``upto``; True when that is all of them. An aborted sequence is passed over."""
        if self._prefilling.get(run.key) is not run:
            return False
        size, pool, start = self.args.block_size, self.pool, run.computed
        self._backlog -= upto - start
        first, into = divmod(start, size)
        parent = run.tail if into or not first else bytes(pool.view(run.blocks[first - 1]))
        data, content, at = run.tokens[start:upto].tobytes(), pool.content, 0
        contents: list[bytes] = []
        for stop in range(4 * (size - into), len(data) + 4 * size, 4 * size):
            run.tail = parent + data[at:stop]
            parent = content(run.tail)
            contents.append(parent)
            at = stop
        pool.write(run.blocks[first : first + len(contents)], contents)
        run.computed = upto
        self._register(run)
        if upto < len(run.tokens):
            return False
        del self._prefilling[run.key]
        if run.hand_over:
            self._hand_over(run)
        return not run.hand_over

    def _hand_over(self, run: Run) -> None:
        """Others read its full blocks from here on; that of the last token is left out, for they compute that."""
        full = (len(run.tokens) - 1) // self.args.block_size
        self.cache.release(reversed(run.blocks[full:]))
        self.lending.hold(run.key, run.blocks[:full], run.keys[:full], run.cached)
        run.reset()

    def _append(self, runs: list[Run]) -> None:
        """Write the newest token of each sequence into its last block."""
        content = self.pool.content
        for run in runs:
            run.tail = tail = run.tail + run.tokens[-1].to_bytes(4, "little")
            run.last[:] = content(tail)
            run.computed += 1

    def _emit(self, runs: list[Run], outputs: list[Output]) -> None:
        """Choose each sequence's next token, from the bytes of all its blocks."""
        assert self._vocabulary is not None
        ring, first = self._vocabulary.ring, self._vocabulary.first
        size, join, digest, add = len(first), b"".join, xxh3_64_intdigest, outputs.append
        for run in runs:
            position, spans = run.computed, run.spans
            chosen = digest(join(spans) if len(spans) > 1 else spans[0])
            rows: tuple[Row, ...] = ()
            if run.careful is None:
                rank = draw(run.odds, run.seed, position) if run.odds else 0
                token = ring[first[chosen % size] + rank]
            else:
                token, rows = run.careful.choose(chosen, run.seed, position, position - run.prompt_len)
            run.tokens.append(token)
            finish = "length" if position + 1 >= run.end else ""
            if run.stop and token in run.stop and position + 1 - run.prompt_len >= run.params.min_tokens:
                finish = "stop"
            if finish or rows or run.cached:
                add(Output(run.key, (token,), finish, run.cached, rows))
                run.cached = 0
            else:
                add(Output(run.key, (token,)))
            if finish:
                del self._decoding[run.key]
                self._register(run)
                self._free(run)

    def _register(self, run: Run) -> None:
        """Make the blocks that have become full reusable, and log those that are new."""
        size, cache, known = self.args.block_size, self.cache, run.registered
        run.registered = full = run.computed // size
        if full == known:
            return
        if full > len(run.keys):
            run.chain.extend(run.tokens[len(run.keys) * size : full * size].tobytes())
        new = cache.register(run.blocks, run.keys, known, full)
        if new > known:
            self._look(run)
        if new < full:
            hashes = hashes_of(run.keys[new:full])
            parent = hash_of(run.keys[new - 1]) if new else None
            tokens = tuple(run.tokens[new * size : full * size])
            cache.stored(BlocksStored(hashes, parent, tokens, run.params.cache_salt, run.params.lora))

    def _next_block(self, run: Run) -> None:
        """The last block is full: register it and get another; if there is none, the youngest sequence goes back to
        the queue and will be computed again."""
        self._register(run)
        while not self.cache.available:
            running = chain(self._decoding.values(), self._prefilling.values())
            youngest = max((other for other in running if not other.pull), key=lambda other: other.admitted)
            self._preempt(youngest)
            if youngest is run:
                return
        last, block = run.blocks[-1], self.cache.allocate()
        run.tail = bytes(self.pool.view(last))
        run.last = self.pool.view(block)
        self.pool.extend(run.spans, last, block)
        run.blocks.append(block)

    def _look(self, run: Run) -> None:
        """The sequence's blocks have changed."""
        run.spans = self.pool.spans(run.blocks)
        run.last = self.pool.view(run.blocks[-1])

    def _preempt(self, run: Run) -> None:
        if self._prefilling.pop(run.key, None) is not None:
            self._backlog += run.computed
        else:
            del self._decoding[run.key]
            self._backlog += len(run.tokens)
        self._free(run)
        self._waiting[run.key] = run
        self._waiting.move_to_end(run.key, last=False)

    def _free(self, run: Run) -> None:
        if run.pull and run.blocks:
            self.lending.leave(run.key, run.blocks[run.registered : run.pull])
            del run.blocks[run.registered : run.pull]
        self.cache.release(reversed(run.blocks))
        run.reset()
