"""The Engine that vLLM is."""

from __future__ import annotations

import os
import queue
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from p2pdyn.core.types import Load
from p2pdyn.engines import leftovers
from p2pdyn.engines.base import (
    EngineError,
    EngineInfo,
    EngineOptions,
    EngineUsageError,
    Held,
    Output,
    Progress,
    Release,
    Sequence,
    Step,
    TransferOrder,
)
from p2pdyn.engines.hosted import (
    Unreadable,
    budget,
    card_of,
    folder_of,
    joined,
    log_to_stderr,
    one_line,
    weights_of,
)
from p2pdyn.engines.logtap import LogTap
from p2pdyn.engines.postbox import Postbox
from p2pdyn.engines.vllm import arguments, handoff, sampling, versions
from p2pdyn.engines.vllm.bridge import Bridge, Job
from p2pdyn.engines.vllm.logtap import ERROR, STAGES, VAGUE
from p2pdyn.engines.vllm.stats import Stats

MAX_HELD = 4096
"""Hand-overs whose names are kept for a Release; older ones end with their leases."""


def create(options: EngineOptions) -> VllmEngine:
    """The registry's entry."""
    return VllmEngine(options)


class VllmEngine:
    """See :class:`p2pdyn.engines.base.Engine`. ``wakeup_fd`` is readable when a step is due."""

    def __init__(self, options: EngineOptions) -> None:
        self._box = Postbox()
        self.wakeup_fd = self._box.wakeup_fd
        self._options = options
        self._stats = Stats(lambda: self._bridge.core_stepped() if self._bridge is not None else None)
        self._bridge: Bridge | None = None
        self._tap: LogTap | None = None
        self._parsed: arguments.Arguments | None = None
        self._instant: list[Output] = []
        self._open: set[int] = set()
        self._held: dict[int, str] = {}
        self._loras: dict[str, Any] = {}
        self._eos: tuple[int, ...] = ()
        self._context = self._blocks = 0
        self._ranks = 1
        self._by_priority = self._traced = False

    # ---- loading

    def load(self, progress: Progress) -> EngineInfo:
        log_to_stderr("vllm")
        progress(0.0, "importing vLLM")
        version = versions.installed()
        arguments.environment(self._options)
        if self._options.model and os.path.isdir(self._options.model):
            card_of(folder_of(self._options.model, None), 0, ())  # tells what it lacks before a long import
        parsed = self._parsed = arguments.parse(self._options)
        progress(0.15, "reading the model's configuration")
        config = _configured(parsed.engine)
        leftovers.remove(self._options.data_dir)
        folder = folder_of(parsed.engine.model, parsed.engine.revision)
        guided = not config.model_config.skip_tokenizer_init
        features = tuple(sorted(sampling.FEATURES + ("guided",) * guided + ("lora",) * bool(parsed.loras)))
        self._start(config, progress)
        self._learn(config)
        card = card_of(folder, self._context, features)
        self._eos = card.eos_token_ids
        progress(1.0, "ready")
        return EngineInfo(
            "vllm",
            version,
            self._options.served_name or (folder.name if os.path.isdir(parsed.engine.model) else parsed.engine.model),
            card.pack(),
            config.cache_config.block_size,
            self._blocks,
            config.scheduler_config.max_num_seqs * self._ranks,
            self._context,
            features,
            _weights(folder, config),
            ranks=self._ranks,
            kv_events=bool(parsed.publishers),
            publishers=parsed.publishers,
            moves_kv=parsed.moves_kv,
        )

    def _start(self, config: Any, progress: Progress) -> None:
        """Have the engine core started in the bridge's thread, and tell how far it is."""
        from vllm.v1.engine.async_llm import AsyncLLM

        assert self._parsed is not None
        args = self._parsed.engine
        stages: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        tap = self._tap = LogTap(lambda *stage: stages.put(stage), STAGES, ERROR, VAGUE, descriptors=(1,))

        def build() -> Any:
            return AsyncLLM.from_vllm_config(
                config,
                stat_loggers=[self._stats.logger],
                enable_log_requests=args.enable_log_requests,
                disable_log_stats=args.disable_log_stats,
            )

        progress(0.2, "starting vLLM")
        bridge = Bridge(build, self._box, self._stats.news)
        while not bridge.started.wait(0.05):
            with suppress(queue.Empty):
                progress(*stages.get_nowait())
        if bridge.failure is not None:
            reason = tap.error or one_line(bridge.failure)
            raise EngineError(f"vLLM could not start: {reason}") from bridge.failure
        self._bridge = bridge
        leftovers.record(self._options.data_dir)

    def _learn(self, config: Any) -> None:
        """What vLLM has resolved while it loaded."""
        from vllm.lora.request import LoRARequest

        assert self._parsed is not None
        self._context = config.model_config.max_model_len
        self._blocks = config.cache_config.num_gpu_blocks or 0
        self._ranks = config.parallel_config.data_parallel_size
        self._by_priority = config.scheduler_config.policy == "priority"
        self._traced = config.observability_config.otlp_traces_endpoint is not None
        loras = enumerate(self._parsed.loras.items(), 1)
        self._loras = {name: LoRARequest(name, number, path) for number, (name, path) in loras}

    # ---- Engine

    def submit(self, sequence: Sequence, now: float) -> None:
        room, finish, detail = budget(sequence, self._context)
        lora = sequence.params.lora
        if lora and lora not in self._loras:
            finish, detail = "error", f"adapter {lora!r} is not known: name it after -- with --lora-modules NAME=FOLDER"
        if finish:
            self._instant.append(Output(sequence.key, (), finish, detail=detail))
            return
        try:
            job = self._job(sequence, room)
        except Exception as error:  # vLLM's and pydantic's, of several unrelated classes
            finish = "error" if isinstance(error, Unreadable) else "invalid"
            self._instant.append(Output(sequence.key, (), finish, detail=one_line(error)))
            return
        self._open.add(sequence.key)
        assert self._bridge is not None
        self._bridge.submit(job)

    def _job(self, sequence: Sequence, room: int) -> Job:
        """Raises ValueError."""
        params = sequence.params
        transfer = handoff.prefill() if sequence.hand_over else None
        if sequence.remote:
            transfer = handoff.decode(sequence.remote)
        options: dict[str, Any] = {}
        if params.lora:
            options["lora_request"] = self._loras[params.lora]
        if self._ranks > 1:
            options["data_parallel_rank"] = sequence.rank
        if self._by_priority:
            options["priority"] = params.priority
        if self._traced and sequence.traceparent:
            options["trace_headers"] = {"traceparent": sequence.traceparent}
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": sequence.tokens.tolist()}
        if params.cache_salt:
            prompt["cache_salt"] = params.cache_salt
        vllm_params = sampling.to_vllm(sequence, room, self._eos, transfer)
        remote, alternatives = bool(sequence.remote), params.logprobs
        return Job(sequence.key, prompt, vllm_params, sequence.hand_over, remote, alternatives, options)

    def abort(self, key: int, now: float) -> None:
        if key in self._open:
            self._open.discard(key)
            assert self._bridge is not None
            self._bridge.abort(key)
        self._instant = [output for output in self._instant if output.key != key]

    def transfer(self, order: TransferOrder, now: float) -> None:
        if isinstance(order, Release) and (request := self._held.pop(order.key, "")):
            assert self._bridge is not None
            self._bridge.release(request)

    def next_step(self, now: float) -> float | None:
        return now if self._instant or self._box.due else None

    def step(self, now: float) -> Step:
        """What has arrived since the last one."""
        bridge = self._bridge
        assert bridge is not None
        self._box.begin_step(self._tap.error if self._tap is not None else "")
        outputs = {output.key: output for output in self._instant}
        self._instant = []
        transfers = []
        while self._box.arrived:
            item = self._box.arrived.popleft()
            if item.key not in self._open:
                if isinstance(item, Held):
                    bridge.release(handoff.request_of(item.params))
                continue
            if isinstance(item, Held):
                transfers.append(item)
                self._hold(item)
            else:
                outputs[item.key] = joined(outputs.get(item.key), item)
        self._open.difference_update(key for key, output in outputs.items() if output.finish)
        return Step(list(outputs.values()), transfers=list(transfers))

    def _hold(self, held: Held) -> None:
        self._open.discard(held.key)
        self._held[held.key] = handoff.request_of(held.params)
        while len(self._held) > MAX_HELD:
            del self._held[next(iter(self._held))]

    def load_report(self) -> Load:
        return self._stats.load(self._blocks, not self._open)

    def close(self) -> None:
        if self._bridge is not None:
            self._bridge.close()
            self._bridge = None
            leftovers.remove(self._options.data_dir)
        if self._parsed is not None and self._parsed.sockets is not None:
            shutil.rmtree(self._parsed.sockets, ignore_errors=True)


def _configured(args: Any) -> Any:
    """vLLM's configuration. Raises EngineUsageError for arguments that do not go together, or with the model."""
    try:
        return args.create_engine_config()
    except Exception as error:  # pydantic's, ValueError, OSError, KeyError, of whatever reads the model
        raise EngineUsageError(f"vLLM cannot be configured so: {one_line(error)}") from error


def _weights(folder: Path, config: Any) -> str:
    model, dummy = config.model_config, config.load_config.load_format == "dummy"
    return weights_of(folder, model.dtype, model.quantization, config.cache_config.cache_dtype, dummy)
