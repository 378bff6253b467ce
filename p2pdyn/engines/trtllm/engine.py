"""The Engine that TensorRT-LLM is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from p2pdyn.core.types import Load
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
from p2pdyn.engines.hosted import budget, card_of, folder_of, joined, log_to_stderr, one_line, weights_of
from p2pdyn.engines.postbox import Postbox
from p2pdyn.engines.trtllm import arguments, handoff, sampling, strays, versions
from p2pdyn.engines.trtllm.bridge import Bridge, Job
from p2pdyn.engines.trtllm.events import Events
from p2pdyn.engines.trtllm.stats import Stats
from p2pdyn.text.card import ModelCard

BLOCK_SIZE = 32
"""TensorRT-LLM's own, where it does not say."""


def create(options: EngineOptions) -> TrtllmEngine:
    """The registry's entry."""
    return TrtllmEngine(options)


class TrtllmEngine:
    """See :class:`p2pdyn.engines.base.Engine`. ``wakeup_fd`` is readable when a step is due."""

    def __init__(self, options: EngineOptions) -> None:
        self._box = Postbox()
        self.wakeup_fd = self._box.wakeup_fd
        self._options = options
        self._stats = Stats()
        self._bridge: Bridge | None = None
        self._instant: list[Output] = []
        self._open: set[int] = set()
        self._loras: dict[str, Any] = {}
        self._features: tuple[str, ...] = ()
        self._eos: tuple[int, ...] = ()
        self._context = self._blocks = self._block_size = 0
        self._takes: frozenset[str] | None = frozenset()
        self._machine = handoff.machine(options.node, options.epoch)
        self._traced = False

    # ---- loading

    def load(self, progress: Progress) -> EngineInfo:
        log_to_stderr("trtllm")
        progress(0.0, "importing TensorRT-LLM")
        version = versions.installed()
        arguments.environment(self._options)
        if self._options.model and os.path.isdir(self._options.model):
            card_of(folder_of(self._options.model, None), 0, ())  # tells what it lacks before a long import
        fields = _fields()
        parsed = arguments.parse(self._options, fields)
        model = str(parsed.get("model"))
        folder = folder_of(model, parsed.get("revision"))
        strays.end(self._options.data_dir)
        strays.mark(self._options.data_dir)
        progress(0.1, "loading the model (TensorRT-LLM does not tell how far it is)")
        llm = _made(parsed)
        progress(0.9, "answering a first prompt")
        events = self._start(llm, parsed)
        self._takes = versions.parameters(llm.generate_async)
        self._traced = bool(parsed.get("otlp_traces_endpoint"))
        self._features = self._able(version, parsed)
        card = self._learn(llm, parsed, folder)
        progress(1.0, "ready")
        moves = parsed.get("cache_transceiver_config.backend") and self._options.role in arguments.ROLES
        return EngineInfo(
            "trtllm",
            version,
            self._options.served_name or (folder.name if os.path.isdir(model) else model),
            card.pack(),
            self._block_size,
            self._blocks,
            int(_setting(llm, parsed, "max_batch_size", 2048)),
            self._context,
            self._features,
            _weights(folder, llm, parsed),
            kv_events=events is not None,
            moves_kv=f"trtllm-{version}" if moves else "",
        )

    def _start(self, llm: Any, parsed: arguments.Arguments) -> Events | None:
        """Have the LLM answer a first prompt. With attention DP there are several caches, and a step has no place for
        ranks: their events stay off, and such a worker is routed by load."""
        from tensorrt_llm.executor.request import LoRARequest

        names = enumerate(parsed.loras.items(), 1)
        self._loras = {name: LoRARequest(name, number, path) for number, (name, path) in names}
        self._block_size = int(_setting(llm, parsed, "kv_cache_config.tokens_per_block", BLOCK_SIZE))
        on = parsed.get("kv_cache_config.event_buffer_max_size") and parsed.get("kv_cache_config.enable_block_reuse")
        events = None
        if on and not parsed.get("enable_attention_dp"):
            events = Events(self._block_size, {one.lora_int_id: name for name, one in self._loras.items()})
        bridge = Bridge(llm, self._stats, events, self._box)
        try:
            bridge.start()
        except Exception as error:
            raise EngineError(f"TensorRT-LLM did not answer a first prompt: {one_line(error)}") from error
        self._bridge = bridge
        self._blocks = self._stats.blocks or (events.capacity if events is not None else 0)
        return events

    def _able(self, version: str, parsed: arguments.Arguments) -> tuple[str, ...]:
        """What is honoured, by version, arguments and signatures."""
        features = [*sampling.FEATURES, *versions.honoured(version, parsed.llm)]
        if parsed.get("guided_decoding_backend"):
            features.append("guided")
        if self._loras:
            features.append("lora")
        if self._has("priority") and parsed.get("scheduler_config.waiting_queue_policy") == "priority":
            features.append("priority")
        return tuple(sorted(features))

    def _has(self, option: str) -> bool:
        return self._takes is None or option in self._takes

    def _learn(self, llm: Any, parsed: arguments.Arguments, folder: Path) -> ModelCard:
        """What TensorRT-LLM has resolved while it loaded."""
        card = card_of(folder, int(_setting(llm, parsed, "max_seq_len", 0)), self._features)
        self._context, self._eos = card.context, card.eos_token_ids
        told = getattr(llm, "get_kv_cache_capacity", None)
        if told is not None and (capacity := told()):
            self._blocks, self._block_size = int(capacity["maxNumBlocks"]), int(capacity["tokensPerBlock"])
        if not self._blocks or not self._context:
            raise EngineError(
                "TensorRT-LLM does not tell its context and how many KV blocks it has: give --max-seq-len and leave "
                "enable_iter_perf_stats on"
            )
        self._stats.blocks = self._blocks
        return card

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
        except Exception as error:  # TensorRT-LLM's and pydantic's, of several unrelated classes
            finish = "invalid" if isinstance(error, sampling.Invalid) else "error"
            self._instant.append(Output(sequence.key, (), finish, detail=one_line(error)))
            return
        if isinstance(job, Output):
            self._instant.append(job)
            return
        self._open.add(sequence.key)
        assert self._bridge is not None
        self._bridge.submit(job)

    def _job(self, sequence: Sequence, room: int) -> Job | Output:
        """An Output where nothing is left to do. Raises ValueError."""
        params = sequence.params
        stops = sampling.stops_of(params, self._eos)
        options: dict[str, Any] = {
            "inputs": {"prompt_token_ids": sequence.tokens.tolist()},
            "sampling_params": sampling.to_trtllm(sequence, room, self._eos, self._features),
            "streaming": not sequence.hand_over,
        }
        self._optional(sequence, options)
        end = stops[0] if stops else sampling.NO_TOKEN
        job = Job(sequence.key, options, room, frozenset(stops), end, params.logprobs, sequence.hand_over)
        if sequence.hand_over:
            options["disaggregated_params"] = handoff.context_only(self._machine)
        elif sequence.remote:
            found = handoff.decode(sequence.remote)
            if handoff.ENDED in found:
                return Output(sequence.key, tuple(found[handoff.ENDED]), "stop", int(found.get(handoff.CACHED, 0)))
            if params.logprobs is None or handoff.carries_logprobs():  # else all of it is computed here
                job.alone = dict(options)
                job.options = {**options, "disaggregated_params": handoff.generation_only(found)}
                job.cached = int(found.get(handoff.CACHED, 0))
        return job

    def _optional(self, sequence: Sequence, options: dict[str, Any]) -> None:
        """Arguments that not every version has. Raises ValueError where one is needed and missing."""
        params = sequence.params
        if params.lora:
            options["lora_request"] = self._loras[params.lora]
        if params.cache_salt:
            if not self._has("cache_salt"):
                raise ValueError("this TensorRT-LLM has no cache_salt: ask without it")
            options["cache_salt"] = params.cache_salt
        if "priority" in self._features:
            options["priority"] = sampling.priority_of(params.priority)
        if self._traced and sequence.traceparent and self._has("trace_headers"):
            options["trace_headers"] = {"traceparent": sequence.traceparent}

    def abort(self, key: int, now: float) -> None:
        if key in self._open:
            self._open.discard(key)
            assert self._bridge is not None
            self._bridge.abort(key)
        self._instant = [output for output in self._instant if output.key != key]

    def transfer(self, order: TransferOrder, now: float) -> None:
        if isinstance(order, Release):
            assert self._bridge is not None
            self._bridge.release(order.key)

    def next_step(self, now: float) -> float | None:
        assert self._bridge is not None
        return now if self._instant or self._bridge.kv or self._box.due else None

    def step(self, now: float) -> Step:
        """What has arrived since the last one."""
        bridge = self._bridge
        assert bridge is not None
        self._box.begin_step()
        outputs = {output.key: output for output in self._instant}
        self._instant = []
        step = Step()
        while self._box.arrived:
            item = self._box.arrived.popleft()
            if item.key not in self._open:
                if isinstance(item, Held):
                    bridge.release(item.key)
            elif isinstance(item, Held):
                step.transfers.append(item)
            else:
                outputs[item.key] = joined(outputs.get(item.key), item)
        while bridge.kv:
            step.kv.append(bridge.kv.popleft())
        step.outputs = list(outputs.values())
        self._open.difference_update(step.ended())
        return step

    def load_report(self) -> Load:
        return self._stats.load(not self._open and (self._bridge is None or not self._bridge.busy))

    def close(self) -> None:
        if self._bridge is not None:
            self._bridge.close()
            self._bridge = None
            strays.end(self._options.data_dir)


def _fields() -> frozenset[str] | None:
    """The names that the LLM takes, where its arguments' class tells them."""
    try:
        from tensorrt_llm.llmapi import TorchLlmArgs
    except ImportError:
        return None
    except Exception as error:  # a driver or a library that is missing
        raise EngineError(f"TensorRT-LLM cannot be imported: {one_line(error)}") from error
    return versions.parameters(TorchLlmArgs)


def _made(parsed: arguments.Arguments) -> Any:
    """The LLM, loaded. In this process's first thread: it may set handlers for signals."""
    try:
        from tensorrt_llm import LLM
    except Exception as error:
        raise EngineError(f"TensorRT-LLM cannot be imported: {one_line(error)}") from error
    try:
        return LLM(**parsed.llm)
    except Exception as error:
        if isinstance(error, TypeError) or type(error).__name__ == "ValidationError":
            raise EngineUsageError(f"TensorRT-LLM does not take the arguments after --: {one_line(error)}") from error
        raise EngineError(f"TensorRT-LLM could not start: {one_line(error)}") from error


def _setting(llm: Any, parsed: arguments.Arguments, dotted: str, default: Any) -> Any:
    """As TensorRT-LLM resolved it, else as it was given."""
    return arguments.found(getattr(llm, "args", None), dotted) or parsed.get(dotted, default)


def _weights(folder: Path, llm: Any, parsed: arguments.Arguments) -> str:
    dtype, kv_dtype, load = (
        str(_setting(llm, parsed, name, "auto")) for name in ("dtype", "kv_cache_config.dtype", "load_format")
    )
    return weights_of(folder, dtype, None, kv_dtype, "dummy" in load.lower())
