"""A double of TensorRT-LLM's LLM API, for tests: its signatures are those of one version, read from a file, and what it
does not allow raises.  It computes with the simulated engine (:mod:`support.trtllm_core`).
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import subprocess
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import msgpack

from p2pdyn.core import types
from p2pdyn.engines.base import Held, Output, Reserved, Sequence
from p2pdyn.engines.sim_args import SimArgs
from support import trtllm_package
from support.trtllm_core import Core, EventLog, Knobs, Transceiver, fetch, settle

METHODS = ("generate_async", "get_stats_async", "get_kv_cache_events_async", "get_kv_cache_capacity", "shutdown")
POISON_AT = 3


class RequestError(RuntimeError):
    """Of one request; the others go on."""


class ValidationError(ValueError):
    """As pydantic's: an argument that is not there."""


def made(version: str) -> SimpleNamespace:
    """The API of ``version``."""
    told = trtllm_package.described(version)
    entries = told["entries"]
    api = SimpleNamespace(told=told, version=version)
    for name, entry in entries.items():
        if name not in ("LLM", "get_global_disagg_request_id") and "." not in name:
            setattr(api, name, _data_class(name, entry["parameters"]))
    methods = {name: _method(name, entries[f"LLM.{name}"]) for name in METHODS if f"LLM.{name}" in entries}
    api.LLM = type("LLM", (_Llm,), {"api": api, "__init__": _method("__init__", entries["LLM"]), **methods})
    if "get_global_disagg_request_id" in entries:
        api.get_global_disagg_request_id = _method(
            "get_global_disagg_request_id", entries["get_global_disagg_request_id"]
        )
    return api


def _data_class(name: str, parameters: str) -> type:
    arguments = ast.parse(f"def f({parameters}): pass").body[0].args  # type: ignore[attr-defined]
    named = [*arguments.args, *arguments.kwonlyargs]
    defaults = [*arguments.defaults, *arguments.kw_defaults]
    missing = [None] * (len(named) - len(defaults))
    fields = []
    for one, default in zip(named, [*missing, *defaults], strict=True):
        kept = dataclasses.field() if default is None else dataclasses.field(default=ast.literal_eval(default))
        fields.append((one.arg, Any, kept))
    checks = {"__post_init__": _check_guides} if name == "SamplingParams" else {}
    return dataclasses.make_dataclass(name, fields, kw_only=not arguments.args, namespace=checks)


def _check_guides(params: Any) -> None:
    """All that SamplingParams looks at of what the adapter gives it."""
    guides = [] if params.guided_decoding is None else list(filter(None, vars(params.guided_decoding).values()))
    if len(guides) > 1:
        raise ValueError(f"Only one guide can be used for a request, but got {len(guides)}.")


def _method(name: str, entry: dict[str, Any]) -> Callable[..., Any]:
    """A function of just these parameters, that hands them on by name."""
    parameters = entry["parameters"]
    if name == "__init__":
        parameters = "self, " + parameters
    space: dict[str, Any] = {"_global_id": _global_id}
    body = (
        "return _global_id(**locals())"
        if name.startswith("get_global")
        else f"return _Llm._{name.strip('_')}(**locals())"
    )
    exec(f"def {name}({parameters}):\n    {body}", {**space, "_Llm": _Llm}, space)
    function: Callable[..., Any] = space[name]
    return function


_ids = count(1)


def _global_id(machine_id: int = 0, node_id: int = 0, process_id: int = 0) -> int:
    if not (0 <= machine_id < 1024 and 0 <= node_id < 256 and 0 <= process_id < 64):
        raise ValueError("out of range")
    return (1 << 40) + next(_ids) + (node_id << 50)


class _Llm:
    """LLM. Methods begin with an underscore; :func:`made` gives them their heads."""

    api: SimpleNamespace

    def _init(self, model: str, kwargs: dict[str, Any], **named: Any) -> None:
        api, self._knobs = self.api, Knobs.read()
        self.args = args = _checked(api.TorchLlmArgs, {"model": model, **named, **kwargs})
        args.kv_cache_config = cache = _checked(api.KvCacheConfig, dict(args.kv_cache_config or {}))
        if args.cache_transceiver_config is not None:
            args.cache_transceiver_config = _checked(api.CacheTransceiverConfig, dict(args.cache_transceiver_config))
        size = cache.tokens_per_block
        blocks = (cache.max_tokens or 4096) // size
        sim = SimArgs(
            prefill_tps=200_000.0, itl_ms=self._knobs.itl_ms, kv_blocks=blocks, block_size=size,
            max_num_seqs=args.max_batch_size, context=args.max_seq_len or 4096,
        )  # fmt: skip
        self._log: EventLog | None = None
        if cache.event_buffer_max_size and cache.enable_block_reuse:
            salts = api.told["event_salts"]
            self._log = EventLog(size, blocks, cache.event_buffer_max_size, salts, tuple(self._knobs.gap_at))
        self._core = Core(model, sim, self._knobs, self._log.tell if self._log is not None else lambda events: None)
        self._blocks, self._keys, self._used = blocks, count(1), False
        self._transceiver = Transceiver(self._core) if args.cache_transceiver_config is not None else None
        self._executor = SimpleNamespace(_fatal_error=None, check_health=lambda: self._executor._fatal_error is None)
        self._down = False
        self._stats = _Iterations(self._core.stats, api.version)
        self._told = _Iterations(self._log.kept if self._log is not None else deque(), api.version)
        if self._knobs.stray:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)

    def _shutdown(self) -> None:
        if self._down:
            return
        self._down = True
        waiting = len(self._transceiver.waiting) if self._transceiver is not None else 0
        if self._transceiver is not None:
            self._transceiver.close()
        self._core.close()
        if waiting:
            raise self._knobs.violated(f"{waiting} context hand-overs were neither fetched nor aborted")

    def _get_stats_async(self, timeout: float) -> Any:
        return self._stats.polled(timeout) if self._used and self.args.enable_iter_perf_stats else _nothing()

    def _get_kv_cache_events_async(self, timeout: float) -> Any:
        if self._log is None:
            raise self._knobs.violated("KV events are asked for, but event_buffer_max_size is 0")
        return self._told.polled(timeout) if self._used else _nothing()

    def _get_kv_cache_capacity(self) -> dict[str, int]:
        size = self.args.kv_cache_config.tokens_per_block
        return {"maxNumBlocks": self._blocks, "tokensPerBlock": size, "maxNumTokens": size * self._blocks}

    def _generate_async(self, inputs: Any, sampling_params: Any, **named: Any) -> _Result:
        if self._down:
            raise RuntimeError("LLM is shutting down")
        self._used = True
        self._check(sampling_params)
        prompt = list(inputs["prompt_token_ids"])
        if not 0.0 <= named.get("priority", 0.5) <= 1.0:
            raise ValueError("priority must be a float in [0.0, 1.0]")
        result = _Result(self, prompt, sampling_params, named["streaming"])
        disaggregated = named["disaggregated_params"]
        salt, lora = named.get("cache_salt"), named["lora_request"]
        params = _params(sampling_params, salt or "", lora.lora_name if lora is not None else "")
        kind = disaggregated.request_type if disaggregated is not None else None
        whole = kind != "generation_only" and not self.args.enable_chunked_prefill
        if whole and len(prompt) > self.args.max_num_tokens:
            raise ValueError(f"The sum of prompt length ({len(prompt)}) should not exceed max_num_tokens")
        if kind is not None and self._transceiver is None:
            raise ValueError("Disaggregated serving needs cache_transceiver_config")
        if kind == "context_only":
            params.max_tokens = 1
            result.context(params)
        elif kind == "generation_only":
            result.generation(params, disaggregated)
        else:
            result.plain(params)
        return result

    def _check(self, params: Any) -> None:
        if params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        for name in self.api.told["ignores"]:
            if getattr(params, name) is not None:
                raise self._knobs.violated(f"{name} is asked for, which this version ignores")
        if params.guided_decoding is not None and self.args.guided_decoding_backend is None:
            raise ValueError("guided decoding needs guided_decoding_backend")
        if params.min_tokens and (params.stop_token_ids or params.ignore_eos):
            raise self._knobs.violated("min_tokens holds back the end id, and nothing else")

    def fatal(self, why: str) -> None:
        self._executor._fatal_error = RuntimeError(why)


class _Result:
    """RequestOutput, of one sequence."""

    def __init__(self, llm: _Llm, prompt: list[int], params: Any, streaming: bool) -> None:
        self.outputs = [SimpleNamespace(
            index=0, token_ids=[], logprobs=[], finish_reason=None, stop_reason=None, disaggregated_params=None
        )]  # fmt: skip
        self.finished, self.cached_tokens, self.request_id = False, 0, next(llm._keys)
        self._llm, self._prompt, self._params, self._streaming = llm, prompt, params, streaming
        self._loop = asyncio.get_running_loop()  # without one its answers could not be awaited
        self._queue: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self._open: set[int] = set()
        self._pulling = self._aborted = False
        self._handed = 0

    def __aiter__(self) -> _Result:
        return self

    async def __anext__(self) -> _Result:
        if self.finished:
            raise StopAsyncIteration
        while True:
            (await self._queue.get())()
            if self.finished or self._streaming:
                return self

    def abort(self) -> None:
        llm, core = self._llm, self._llm._core
        if self._pulling:
            llm.fatal("the cache manager wrote into blocks that it had given away")
            raise llm._knobs.violated("aborted before the first token of a disaggregated decode")
        if self._handed and llm._transceiver is not None:
            llm._transceiver.end(self._handed)
        if self._aborted or self.finished:
            return
        self._aborted = True
        for key in tuple(self._open):
            core.call(lambda key=key: core.engine.abort(key, time.monotonic()))
        self._tell(lambda: self._end("cancelled"))

    # ---- what runs

    def plain(self, params: types.SamplingParams) -> None:
        self._run(self._sequence(params))

    def context(self, params: types.SamplingParams) -> None:
        """Compute and keep, then the first token on top of it."""
        sequence = dataclasses.replace(self._sequence(params), hand_over=True)
        core = self._llm._core

        def held(note: Held | Reserved) -> None:
            assert isinstance(note, Held)
            self._llm._transceiver.waiting[self.request_id] = note  # type: ignore[union-attr]
            self._handed = self.request_id
            if self._aborted:
                self._llm._transceiver.end(self._handed)  # type: ignore[union-attr]
                return
            self.cached_tokens = note.cached
            self._run(self._sequence(params), cached=False)

        core.on_note[sequence.key] = held
        self._open.add(sequence.key)
        core.submit(sequence)

    def generation(self, params: types.SamplingParams, disaggregated: Any) -> None:
        """Fetch, in a thread, then go on behind the first token."""
        first, state = disaggregated.first_gen_tokens, disaggregated.opaque_state
        if not state or not first or disaggregated.ctx_request_id is None:
            raise self._llm._knobs.violated("generation_only without opaque_state, first token or request id")
        port, name, blocks = msgpack.unpackb(state)
        core, sequence = self._llm._core, self._sequence(params, first)
        self._pulling = True
        contents: list[bytes] = []

        def reserved(note: Held | Reserved) -> None:
            assert isinstance(note, Reserved)
            settle(core, note, contents)

        def begin() -> None:
            self._pulling = False
            rows = [] if disaggregated_rows is None else disaggregated_rows
            self._tell(lambda: self._add(Output(0, tuple(first)), list(rows)))
            core.on_note[sequence.key] = reserved
            self._run(dataclasses.replace(sequence, pull=blocks), cached=False)

        disaggregated_rows = getattr(disaggregated, "first_gen_log_probs", None)

        def work() -> None:
            time.sleep(self._llm._knobs.pull_s)
            try:
                contents.extend(fetch(port, name, core.stride))
                if len(contents) != blocks:
                    raise OSError("the context request is no longer there")
            except OSError as error:
                self._pulling, failure = False, RequestError(f"KV cache transfer failed: {error}")
                self._tell(lambda: self._fail(failure))
                return
            core.call(begin)

        threading.Thread(target=work, name="trtllm-double-fetch", daemon=True).start()

    def _sequence(self, params: types.SamplingParams, done: list[int] | None = None) -> Sequence:
        tokens = array("I", [*self._prompt, *(done or [])])
        return Sequence(next(self._llm._keys), tokens, len(self._prompt), params)

    def _run(self, sequence: Sequence, cached: bool = True) -> None:
        core = self._llm._core
        produced = count(1)

        def output(output: Output) -> None:
            if self._llm._knobs.poison == self._params.max_tokens and next(produced) == POISON_AT:
                self._llm.fatal("a kernel failed")
                return
            if cached and output.cached:
                self.cached_tokens = output.cached
            rows = [self._row(output, place) for place in range(len(output.logprobs))]
            self._tell(lambda: self._add(output, rows))

        core.on_output[sequence.key] = output
        self._open.add(sequence.key)
        core.submit(sequence)

    def _row(self, output: Output, place: int) -> dict[int, Any]:
        chosen, others = output.logprobs[place]
        made = self._llm.api.Logprob
        row = {token: made(logprob=value, rank=rank) for rank, (token, value) in enumerate(others, 1)}
        row.setdefault(output.tokens[place], made(logprob=chosen, rank=None))
        return row

    # ---- in the loop's thread

    def _tell(self, work: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, work)

    def _add(self, output: Output, rows: list[Any]) -> None:
        completion, params = self.outputs[0], self._params
        if self.finished:
            return
        completion.token_ids.extend(output.tokens)
        completion.logprobs.extend(rows)
        if output.finish == "stop":
            last = completion.token_ids[-1]
            if last == params.end_id and not params.ignore_eos:
                if not self._llm.api.told["keeps_end_id"]:
                    completion.token_ids.pop()
            else:
                completion.stop_reason = last
                if not params.include_stop_str_in_output:
                    completion.token_ids.pop()
        if output.finish:
            self._end(output.finish, output.detail)
            if self._handed:
                self._hand(output)

    def _hand(self, output: Output) -> None:
        llm, completion = self._llm, self.outputs[0]
        assert llm._transceiver is not None
        if output.finish == "stop":
            llm._transceiver.end(self._handed)
            return
        held = llm._transceiver.waiting[self._handed]
        state = msgpack.packb([llm._transceiver.port, self._handed, len(held.blocks)])
        known = {"first_gen_tokens": list(output.tokens), "ctx_request_id": self.request_id, "opaque_state": state}
        params = llm.api.DisaggregatedParams(request_type="context_only", **known)
        if completion.logprobs and hasattr(params, "first_gen_log_probs"):
            params.first_gen_log_probs = list(completion.logprobs)
        completion.disaggregated_params = params

    def _end(self, reason: str, detail: str = "") -> None:
        self.finished = True
        self.outputs[0].finish_reason = "timeout" if detail else reason

    def _fail(self, error: Exception) -> None:
        self.finished = True
        raise error


class _Iterations:
    """IterationResult: one object for all calls, which stays ended once it was empty."""

    def __init__(self, kept: deque[dict[str, Any]], version: str) -> None:
        self._kept, self._raises = kept, version == trtllm_package.OLDEST
        self._done = False

    def polled(self, timeout: float) -> _Iterations:
        assert timeout == 0.0, "the loop would stand still for as long"
        return self

    def mark_undone(self) -> None:
        self._done = False

    def __aiter__(self) -> _Iterations:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._done:
            raise StopAsyncIteration
        if self._kept:
            return self._kept.popleft()
        if self._raises:
            raise asyncio.QueueEmpty
        self._done = True
        raise StopAsyncIteration


async def _nothing() -> AsyncIterator[dict[str, Any]]:
    for one in ():
        yield one


def _checked(kind: type, values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except TypeError as error:
        raise ValidationError(f"1 validation error for {kind.__name__}\n{error}") from error


def _params(wanted: Any, salt: str, lora: str) -> types.SamplingParams:
    ends = () if wanted.ignore_eos or wanted.end_id < 0 else (wanted.end_id,)
    greedy = wanted.temperature is None and wanted.top_p is None and wanted.top_k is None
    asked = {
        "max_tokens": wanted.max_tokens,
        "temperature": 0.0 if greedy else wanted.temperature,
        "top_p": wanted.top_p,
        "top_k": wanted.top_k,
        "min_tokens": wanted.min_tokens,
        "min_p": wanted.min_p,
        "repetition_penalty": wanted.repetition_penalty,
        "presence_penalty": wanted.presence_penalty,
        "frequency_penalty": wanted.frequency_penalty,
        "seed": wanted.seed,
        "logprobs": wanted.logprobs or None,
        "stop_token_ids": () if wanted.ignore_eos else (*ends, *(wanted.stop_token_ids or ())),
    }
    known = {name: value for name, value in asked.items() if value is not None}
    return types.SamplingParams(**known, cache_salt=salt, lora=lora)
