"""The Engine that SGLang is."""

from __future__ import annotations

import logging
import os
import queue
import re
import shutil
import signal
import threading
import time
from contextlib import suppress
from typing import Any

from p2pdyn.core.types import DECODE, PREFILL, Load
from p2pdyn.engines import leftovers
from p2pdyn.engines.base import (
    EngineError,
    EngineInfo,
    EngineOptions,
    Held,
    Output,
    Progress,
    Release,
    Sequence,
    Step,
    TransferOrder,
)
from p2pdyn.engines.hosted import Unreadable, budget, card_of, folder_of, joined, log_to_stderr, one_line, weights_of
from p2pdyn.engines.logtap import LogTap
from p2pdyn.engines.postbox import Postbox
from p2pdyn.engines.sglang import arguments, handoff, sampling, versions
from p2pdyn.engines.sglang.bridge import Bridge, Job

log = logging.getLogger(__name__)

STAGES = (
    (re.compile(rb"server_args="), 0.25, "starting SGLang's processes"),
    (re.compile(rb"Load weight begin|loading shards:"), 0.4, "loading weights"),
    (re.compile(rb"shards: 100%|Load weight end"), 0.6, "reserving KV memory"),
    (re.compile(rb"KV Cache is allocated|Capture cuda graph begin"), 0.7, "capturing graphs"),
    (re.compile(rb"max_total_num_tokens="), 0.85, "warming up"),
)
ERROR = re.compile(rb"(?:^|: )((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception): .+)")
VAGUE = (b"Initialization failed. Please see", b"died during initialization", b"UserWarning")
DYING_S = 5.0
"""How long a start whose process has said that it dies is waited for, that it says why."""


def create(options: EngineOptions) -> SglangEngine:
    """The registry's entry."""
    return SglangEngine(options)


class SglangEngine:
    """See :class:`p2pdyn.engines.base.Engine`. ``wakeup_fd`` is readable when a step is due."""

    def __init__(self, options: EngineOptions) -> None:
        self._box = Postbox()
        self.wakeup_fd = self._box.wakeup_fd
        self._options = options
        self._bridge: Bridge | None = None
        self._tap: LogTap | None = None
        self._parsed: arguments.Arguments | None = None
        self._instant: list[Output] = []
        self._open: set[int] = set()
        self._lent: set[int] = set()
        """Prompts that are handed over: their partners' streams, not ours, tell how they go on."""
        self._loras: frozenset[str] = frozenset()
        self._eos: tuple[int, ...] = ()
        self._page_size = 1
        self._context = self._blocks = 0
        self._ranks = 1
        self._seeded = self._traced = False
        self._priority = 0
        """1 if lower values go first, -1 if higher ones do, 0 if SGLang does not go by priority."""
        self._quit = False

    # ---- loading

    def load(self, progress: Progress) -> EngineInfo:
        log_to_stderr("sglang")
        progress(0.0, "importing SGLang")
        version = versions.installed()
        arguments.environment(self._options)
        if self._options.model and os.path.isdir(self._options.model):
            card_of(folder_of(self._options.model, None), 0, ())  # tells what it lacks before a long import
        parsed = self._parsed = arguments.parse(self._options)
        leftovers.remove(self._options.data_dir)
        folder = folder_of(parsed.server.model_path, parsed.server.revision)
        bridge = self._start(parsed, progress)
        self._learn(bridge.engine)
        features = self._features()
        card = card_of(folder, self._context, features)
        self._eos = card.eos_token_ids
        dtype, dummy = bridge.engine.tokenizer_manager.model_config.dtype, self._value("load_format") == "dummy"
        progress(1.0, "ready")
        return EngineInfo(
            "sglang",
            version,
            self._options.served_name or (folder.name if os.path.isdir(self._model()) else self._model()),
            card.pack(),
            self._page_size,
            self._blocks,
            bridge.loads.batch(),
            self._context,
            features,
            weights_of(folder, dtype, self._value("quantization"), self._value("kv_cache_dtype"), dummy),
            ranks=self._ranks,
            kv_events=bool(parsed.publishers),
            publishers=parsed.publishers,
            moves_kv=parsed.moves_kv,
        )

    def _model(self) -> str:
        assert self._parsed is not None
        return str(self._parsed.server.model_path)

    def _start(self, parsed: arguments.Arguments, progress: Progress) -> Bridge:
        """Have SGLang started in the bridge's thread, and tell how far it is."""
        stages: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        tap = self._tap = LogTap(lambda fraction, what: stages.put((fraction, what)), STAGES, ERROR, VAGUE)
        if threading.current_thread() is threading.main_thread():
            # What SGLang's processes send their parent when they die; by default it would dump core.
            signal.signal(signal.SIGQUIT, lambda number, frame: self._on_quit())

        def build() -> Any:
            import sglang

            return sglang.Engine(server_args=parsed.server)

        progress(0.2, "starting SGLang")
        bridge = Bridge(build, self._box, bool(parsed.moves_kv))
        dying: float | None = None
        while not bridge.started.wait(0.05):
            with suppress(queue.Empty):
                progress(*stages.get_nowait())
            if self._quit:
                dying = dying or time.monotonic()
                if tap.error or time.monotonic() - dying > DYING_S:
                    raise EngineError(f"SGLang could not start: {tap.error or 'one of its processes has ended'}")
        if bridge.failure is not None:
            reason = tap.error or one_line(bridge.failure)
            raise EngineError(f"SGLang could not start: {reason}") from bridge.failure
        self._bridge = bridge
        leftovers.record(self._options.data_dir)
        return bridge

    def _value(self, name: str) -> Any:
        """A setting as SGLang has resolved it."""
        assert self._bridge is not None
        engine = self._bridge.engine
        read = getattr(engine.tokenizer_manager, "config_value", None)
        return read(name) if read is not None else getattr(engine.server_args, name)

    def _learn(self, engine: Any) -> None:
        """What SGLang has resolved while it loaded."""
        known = engine._scheduler_init_result.scheduler_infos[0]
        self._page_size = self._value("page_size")
        self._context = known["max_req_input_len"] + 1
        self._ranks = self._value("dp_size")
        self._blocks = known["max_total_num_tokens"] // self._page_size * self._ranks
        self._seeded = bool(self._value("enable_deterministic_inference"))
        self._traced = bool(self._value("enable_trace"))
        if self._value("enable_priority_scheduling"):
            self._priority = 1 if self._value("schedule_low_priority_values_first") else -1
        if self._value("enable_lora"):
            self._loras = frozenset(engine.tokenizer_manager.lora_ref_cache)

    def _features(self) -> tuple[str, ...]:
        found = list(sampling.ALWAYS)
        if not self._value("skip_tokenizer_init"):
            found += sampling.WITH_TOKENIZER
        if self._seeded:
            found.append("seed")
        if self._loras:
            found.append("lora")
        return tuple(sorted(found))

    # ---- Engine

    def submit(self, sequence: Sequence, now: float) -> None:
        room, finish, detail = budget(sequence, self._context)
        if not finish:
            finish, detail = self._refusal(sequence)
        if finish:
            self._instant.append(Output(sequence.key, (), finish, detail=detail))
            return
        try:
            job = self._job(sequence, room)
        except (ValueError, TypeError) as error:
            finish = "error" if isinstance(error, Unreadable) else "invalid"
            self._instant.append(Output(sequence.key, (), finish, detail=one_line(error)))
            return
        self._open.add(sequence.key)
        if job.held is not None:
            self._lent.add(sequence.key)
        assert self._bridge is not None
        self._bridge.submit(job)

    def _refusal(self, sequence: Sequence) -> tuple[str, str]:
        """(error, why) for what this SGLang can not do; frontends ask for nothing that ``features`` lack."""
        assert self._bridge is not None
        params, role = sequence.params, self._options.role
        if params.lora and params.lora not in self._loras:
            return "error", f"adapter {params.lora!r} is not known: name it after -- with --lora-paths NAME=FOLDER"
        if params.cache_salt and "cache_salt" not in self._bridge.takes:
            return "error", "this version of SGLang takes no cache_salt"
        if role == DECODE and not sequence.remote:
            return "error", "SGLang in decode mode computes no prompts: a prefill worker has to"
        if role == PREFILL and not sequence.hand_over:
            return "error", "SGLang in prefill mode computes prompts only"
        return "", ""

    def _job(self, sequence: Sequence, room: int) -> Job:
        """Raises ValueError."""
        params = sequence.params
        ask: dict[str, Any] = {
            "input_ids": sequence.tokens.tolist(),
            "sampling_params": sampling.to_sglang(sequence, room, self._eos, self._seeded),
        }
        if params.logprobs is not None:
            ask |= {"return_logprob": True, "top_logprobs_num": params.logprobs}
        if params.lora:
            ask["lora_path"] = params.lora
        if params.cache_salt:
            ask["cache_salt"] = params.cache_salt
        if self._ranks > 1:
            ask["routed_dp_rank"] = sequence.rank
        if self._priority:
            ask["priority"] = self._priority * params.priority
        if self._traced and sequence.traceparent:
            ask["external_trace_header"] = {"traceparent": sequence.traceparent}
        held = None
        if sequence.hand_over:
            assert self._parsed is not None
            opened = handoff.opened(*self._parsed.bootstrap)
            held = Held(sequence.key, params=opened.pack(), computed=False)
            ask |= opened.arguments()
        elif sequence.remote:
            ask |= handoff.unpack(sequence.remote).arguments()
        return Job(sequence.key, ask, params.logprobs, sampling.watched(params), held)

    def abort(self, key: int, now: float) -> None:
        if key in self._open:
            self._forget(key)
            assert self._bridge is not None
            self._bridge.abort(key)
        self._instant = [item for item in self._instant if item.key != key]

    def _forget(self, key: int) -> None:
        self._open.discard(key)
        self._lent.discard(key)

    def transfer(self, order: TransferOrder, now: float) -> None:
        """A Release: nobody will come into that room."""
        if isinstance(order, Release) and order.key in self._lent:
            assert self._bridge is not None
            self._bridge.abort(order.key)

    def next_step(self, now: float) -> float | None:
        return now if self._instant or self._box.due else None

    def step(self, now: float) -> Step:
        """What has arrived since the last one."""
        self._box.begin_step(self._tap.error if self._tap is not None else "")
        outputs: dict[int, Output] = {item.key: item for item in self._instant}
        self._instant = []
        step = Step()
        while self._box.arrived:
            item = self._box.arrived.popleft()
            if item.key not in self._open:
                continue
            if isinstance(item, Held):
                step.transfers.append(item)
            else:
                outputs[item.key] = joined(outputs.get(item.key), item)
        step.outputs = list(outputs.values())
        for key in step.ended():
            self._forget(key)
        return step

    def load_report(self) -> Load:
        assert self._bridge is not None
        return self._bridge.loads.load(self._page_size, self._blocks, not self._open)

    def close(self) -> None:
        if self._bridge is not None:
            self._bridge.close()
            self._bridge = None
            leftovers.remove(self._options.data_dir)
        if self._parsed is not None:
            shutil.rmtree(self._parsed.folder, ignore_errors=True)

    # ---- other threads, and signals

    def _on_quit(self) -> None:
        self._quit = True
        if self._bridge is not None:
            self._box.die("one of SGLang's processes has failed")
