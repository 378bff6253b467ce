"""The Engine of the builtin model."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING

from p2pdyn import __version__
from p2pdyn.core.types import Load
from p2pdyn.engines.base import EngineInfo, EngineOptions, Output, Progress, Sequence, Step, TransferOrder
from p2pdyn.engines.builtin import options as arguments
from p2pdyn.engines.builtin import weights
from p2pdyn.engines.builtin.scheduler import Run, Scheduler
from p2pdyn.engines.lending import Lending
from p2pdyn.engines.memory import TAG_BYTES
from p2pdyn.engines.paged import BlockNames, PagedBlocks
from p2pdyn.text.card import ModelCard, byte_level

if TYPE_CHECKING:
    from p2pdyn.engines.builtin.model import Llama, LlamaConfig
    from p2pdyn.engines.builtin.tiles import F32, Threads

FEATURES = ("logprobs", "min_p", "min_tokens", "penalties", "seed", "top_k")
TINY = "tiny"
SMOOTHING = 0.2
"""Weight of the newest step in the measured speeds."""
WARM_ROWS = 64
"""Rows of the measured prompt at load, and the fewest that a step needs to tell the prompt speed."""


def create(options: EngineOptions) -> BuiltinEngine:
    """The registry's entry."""
    return BuiltinEngine(options)


class BuiltinEngine:
    """See :class:`p2pdyn.engines.base.Engine`. ``cache`` and ``scheduler`` are open to tests."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = arguments.parse(options.args)
        # Products are too small for BLAS threads; `Threads` splits them. Only read when numpy is first imported.
        os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
        self._model_name = options.model
        self._offline = options.offline
        self._kv_memory = options.kv_memory
        tiny = options.model == TINY
        stem = Path(options.model).stem if options.model and options.model.endswith(".gguf") else weights.DEFAULT_NAME
        self._served_name = options.served_name or (TINY if tiny else stem)
        self._model: Llama | None = None
        self._threads: Threads | None = None
        self._eos: frozenset[int] = frozenset()
        self._context = self._vocab = self._outputs = 0
        self._instant: list[Output] = []
        self._random = SystemRandom()
        self._prefill_tps = self._itl_s = 0.0
        self._names: BlockNames | None = None
        self.memory: memoryview | None = None
        self.cache = PagedBlocks(self.options.kv_blocks)
        self.lending = Lending(self.cache, options.epoch)
        self.scheduler = Scheduler(
            self.cache, self.lending, self.options.block_size, self.options.max_num_seqs, self.options.max_batch_tokens
        )

    # ---- Engine

    def load(self, progress: Progress) -> EngineInfo:
        config, card, tensors, digest = self._read(progress)
        from p2pdyn.engines.builtin.model import Llama
        from p2pdyn.engines.builtin.tiles import Threads

        options = self.options
        room = options.kv_blocks * options.block_size
        self._context = min(options.context or config.context, config.context, room)
        self._vocab, self._outputs = config.vocab, config.outputs
        card = replace(card, context=self._context, features=FEATURES)
        if weights.is_default(self._model_name):
            card = replace(card, generation=weights.GENERATION)
        self._eos = frozenset(token for token in card.eos_token_ids if token < config.outputs)
        self._threads = Threads(options.threads)
        model = Llama(config, tensors, options.kv_blocks, options.block_size, self._threads, self._kv_memory)
        packed = card.pack()
        self._model, self.memory = model, model.memory
        self.lending.tags = model.memory[-options.kv_blocks * TAG_BYTES :]
        self._names = BlockNames(packed, digest, options.block_size)
        progress(0.95, "measuring speed")
        self._measure(model)
        progress(1.0, "ready")
        return EngineInfo(
            "builtin",
            __version__,
            self._served_name,
            packed,
            options.block_size,
            options.kv_blocks,
            options.max_num_seqs,
            self._context,
            FEATURES,
            digest,
            block_bytes=model.block_bytes,
        )

    def submit(self, sequence: Sequence, now: float) -> None:
        params, total = sequence.params, len(sequence.tokens)
        end = min(sequence.prompt_len + params.max_tokens, self._context)
        wrong = ""
        if not total:
            wrong = "the prompt is empty"
        elif sequence.prompt_len >= self._context:
            wrong = f"the prompt has {sequence.prompt_len} tokens, but the context is {self._context}: shorten it"
        elif max(sequence.tokens) >= self._vocab:
            wrong = f"token {max(sequence.tokens)} of the prompt is none of the model's {self._vocab}"
        if wrong:
            self._instant.append(Output(sequence.key, (), "invalid", detail=wrong))
        elif total >= end:
            self._instant.append(Output(sequence.key, (), "length"))
        else:
            stops = {token for token in params.stop_token_ids if token < self._outputs}
            if not params.ignore_eos:
                stops |= self._eos
            seed = self._random.getrandbits(64) if params.seed is None else params.seed
            assert self._names is not None
            chain = self._names.chain(params.cache_salt, params.lora)
            self.scheduler.submit(Run(sequence, chain, end, tuple(stops), seed))

    def abort(self, key: int, now: float) -> None:
        self.scheduler.end(key)
        self._instant = [output for output in self._instant if output.key != key]

    def transfer(self, order: TransferOrder, now: float) -> None:
        self.scheduler.transfer(order)

    def next_step(self, now: float) -> float | None:
        return now if self._instant or self.lending.waiting or self.scheduler.due else None

    def step(self, now: float) -> Step:
        started = time.perf_counter()
        outputs, self._instant = self._instant, []
        chunks = self.scheduler.plan()
        if chunks:
            decoding = sum(upto - run.computed == 1 for run, upto in chunks)
            rows = sum(upto - run.computed for run, upto in chunks)
            outputs += self._run(chunks)
            self._note(rows, decoding, time.perf_counter() - started)
        return Step(outputs, self.cache.take_events(), self.lending.take_notes())

    def load_report(self) -> Load:
        used = self.cache.used
        return Load(
            active_requests=len(self.scheduler.running),
            active_blocks=used,
            queued=len(self.scheduler.waiting),
            kv_used=used,
            kv_total=self.options.kv_blocks,
            prefill_tokens_queued=self.scheduler.backlog,
            prefill_tps=self._prefill_tps,
            itl_ms=self._itl_s * 1000,
        )

    def close(self) -> None:
        self.scheduler.close()
        self._instant = []
        self._model = self.memory = None
        self.lending.tags = memoryview(b"")
        if self._threads is not None:
            self._threads.close()
            self._threads = None

    def check(self) -> None:
        """Raise AssertionError if the bookkeeping of blocks is broken."""
        self.scheduler.check()

    # ---- loading

    def _read(self, progress: Progress) -> tuple[LlamaConfig, ModelCard, Mapping[str, F32], str]:
        """Configuration, card, tensors, mapped from the cache, where the first worker of a host puts them, and a digest
        of the weights."""
        from p2pdyn.engines.builtin import checkpoint

        if self._model_name == TINY:
            from p2pdyn.engines.builtin.tiny import TINY as config
            from p2pdyn.engines.builtin.tiny import random_tensors

            tensor = random_tensors(checkpoint.shapes(config))
            return config, byte_level(), dict(checkpoint.pack(config, tensor, None)), TINY
        cache = weights.cache_folder()
        path = weights.locate(self._model_name, self._offline, cache, progress)
        packed = checkpoint.load(path, cache, progress)
        return packed.config, ModelCard.unpack(packed.card), packed.tensors, packed.weights

    def _measure(self, model: Llama) -> None:
        """Touch all weights, then time a prompt and a decode step, so that the first load report is true. The blocks
        written are free, and will be written again before they are read."""
        from array import array

        from p2pdyn.engines.builtin.model import Rows

        size = self.options.block_size
        rows = max(1, min(WARM_ROWS, self._context - 1))
        blocks = list(range(-(-(rows + 1) // size)))
        for attempt in range(2):
            started = time.perf_counter()
            model.forward([Rows(array("I", [0] * rows), 0, blocks, logits=True)])
            prompt = time.perf_counter()
            model.forward([Rows(array("I", [0]), rows, blocks, logits=True)])
            if attempt:
                self._prefill_tps = rows / (prompt - started)
                self._itl_s = time.perf_counter() - prompt

    # ---- running

    def _run(self, chunks: list[tuple[Run, int]]) -> list[Output]:
        from p2pdyn.engines.builtin.model import Rows

        assert self._model is not None
        logits = self._model.forward(
            [
                Rows(
                    run.tokens[run.computed : upto],
                    run.computed,
                    run.blocks,
                    logits=upto == len(run.tokens) and not run.hand_over,
                )
                for run, upto in chunks
            ]
        )
        outputs: list[Output] = []
        for run, upto in chunks:
            self.scheduler.computed(run, upto)
            if upto < len(run.tokens):
                continue
            if run.hand_over:
                self.scheduler.hand_over(run)
            else:
                outputs.append(self._next_token(run, logits[len(outputs)]))
        return outputs

    def _next_token(self, run: Run, logits: F32) -> Output:
        from p2pdyn.engines.builtin import sampling

        params = run.params
        token = sampling.choose(logits, run.tokens, run.prompt_len, params, run.stops, run.seed)
        output = Output(run.key, (token,), cached=run.cached)
        run.cached = 0
        if params.logprobs is not None:
            output.logprobs = (sampling.logprobs(logits, token, params.logprobs),)
        run.tokens.append(token)
        if token in run.stops:
            output.finish = "stop"
        elif len(run.tokens) >= run.end:
            output.finish = "length"
        if output.finish:
            self.scheduler.end(run.key)
        return output

    def _note(self, rows: int, decoding: int, seconds: float) -> None:
        """Keep the measured speeds current; a step that mixes prompts and decoding tells neither."""
        if rows == decoding:
            self._itl_s += SMOOTHING * (seconds - self._itl_s)
        elif not decoding and rows >= WARM_ROWS:
            self._prefill_tps += SMOOTHING * (rows / seconds - self._prefill_tps)
