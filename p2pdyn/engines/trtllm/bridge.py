"""tensorrt_llm.LLM on an event loop in a thread of its own.

Everything public here is called from the engine's thread; what TensorRT-LLM answers is put into ``box``, its KV
events into :attr:`Bridge.kv`.

A request that fetches another worker's cache must not be aborted before its first token: TensorRT-LLM would take blocks
back that are being written to.  It is read on, silently, and aborted then.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from p2pdyn.engines.base import Held, KvEvent, Output
from p2pdyn.engines.hosted import one_line
from p2pdyn.engines.postbox import Postbox
from p2pdyn.engines.trtllm import handoff, sampling
from p2pdyn.engines.trtllm.arguments import TRANSFER_TIMEOUT_MS
from p2pdyn.engines.trtllm.events import Events
from p2pdyn.engines.trtllm.polling import Poller, ended
from p2pdyn.engines.trtllm.stats import Stats

log = logging.getLogger(__name__)

BUSY_S, IDLE_S = 0.01, 0.1
"""Between two looks at events and statistics, while requests run and while none does."""
HEALTH_S = 1.0
END_S = 30.0
"""How long an aborted request may take to end; then it is left alone."""
CLOSE_S = 2.0
FIRST_S = 300.0
"""The first request of all: kernels may be built for it."""
MAX_HELD = 4096
"""Hand-overs kept for a Release; older ones have ended by TensorRT-LLM's own timeout."""
PULLED_S = TRANSFER_TIMEOUT_MS / 1000
"""Blocks that did not come by then will not."""


@dataclass(slots=True)
class Job:
    """One sequence under way. ``options`` are for generate_async, ``room`` is how many tokens it may produce, and
    ``told`` how many of them were put out; ``stops`` are the tokens that end it, of which TensorRT-LLM may take ``end``
    away; ``alternatives`` is how many logprobs are asked for."""

    key: int
    options: dict[str, Any]
    room: int
    stops: frozenset[int]
    end: int
    alternatives: int | None = None
    hand_over: bool = False
    cached: int | None = None
    """Prompt tokens that were cached where it was prefilled."""
    alone: dict[str, Any] | None = None
    """While another worker's blocks are being written here: the options for computing all of it if they do not come."""
    told: int = 0
    result: Any = None
    limit: asyncio.Timeout | None = None
    over: bool = False
    """Its end was told, or nobody wants more."""


class Bridge:
    """``llm`` is loaded. The loop begins with :meth:`start`."""

    def __init__(self, llm: Any, stats: Stats, events: Events | None, box: Postbox) -> None:
        self.kv: deque[KvEvent] = deque()
        self._llm = llm
        self._stats = stats
        self._poller = Poller(llm, stats, events)
        self._box = box
        self._jobs: dict[int, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: dict[int, Any] = {}
        self._failure: Exception | None = None
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=self._run_thread, name="trtllm", daemon=True)

    # ---- the engine's thread

    def start(self) -> None:
        """Returns when a first request was answered. Raises what that raised."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def busy(self) -> bool:
        """Something runs, even if nobody wants it any more."""
        return bool(self._jobs)

    def submit(self, job: Job) -> None:
        self._loop.call_soon_threadsafe(self._begin, job)

    def abort(self, key: int) -> None:
        self._loop.call_soon_threadsafe(self._cancel, key)

    def release(self, key: int) -> None:
        """Let the blocks go that a hand-over holds."""
        self._loop.call_soon_threadsafe(self._let_go, key)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(CLOSE_S + 0.5)

    # ---- the loop's thread

    def _run_thread(self) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self._first()
        except Exception as error:  # of whatever class TensorRT-LLM raises
            self._failure = error
        self._started.set()
        if self._failure is None:
            for work in (self._look(), self._watch()):
                self._keep(asyncio.create_task(work))
            await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        # A daemon: a shutdown that hangs must not keep this process, whose group is killed if need be.
        end = threading.Thread(target=self._llm.shutdown, name="trtllm-end", daemon=True)
        end.start()
        await asyncio.to_thread(end.join, CLOSE_S)

    async def _first(self) -> None:
        """A request whose answer nobody reads: TensorRT-LLM tells no statistics and no events before one was made."""
        import tensorrt_llm

        params = tensorrt_llm.SamplingParams(
            max_tokens=2, temperature=0.0, end_id=sampling.NO_TOKEN, pad_id=0, ignore_eos=True, detokenize=False
        )
        async with asyncio.timeout(FIRST_S):
            inputs = {"prompt_token_ids": [0]}
            async for _ in self._llm.generate_async(inputs=inputs, sampling_params=params, streaming=True):
                pass
        for _ in range(10):  # its last iteration is told a little later
            await self._poll()
            if self._stats.blocks:
                break
            await asyncio.sleep(BUSY_S)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- requests

    def _begin(self, job: Job) -> None:
        self._jobs[job.key] = job
        task = asyncio.create_task(self._serve(job))
        self._keep(task)
        task.add_done_callback(lambda _: self._ended(job))

    def _ended(self, job: Job) -> None:
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
        if not self._jobs:
            self._box.tell_moved()  # for a last load report, as no iteration follows

    def _cancel(self, key: int) -> None:
        job = self._jobs.get(key)
        if job is None or job.over:
            return
        job.over = True
        if job.result is not None:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        """Nobody wants more of it, but it has to end."""
        if job.limit is not None:
            job.limit.reschedule(self._loop.time() + (PULLED_S if job.alone else 0.0) + END_S)
        if not job.alone:
            self._abort(job)

    def _abort(self, job: Job) -> None:
        try:
            job.result.abort()
        except Exception as error:
            log.warning("TensorRT-LLM did not abort a request: %s", one_line(error))

    def _let_go(self, key: int) -> None:
        result = self._held.pop(key, None)
        if result is not None:
            with suppress(Exception):  # it has ended meanwhile
                result.abort()

    async def _serve(self, job: Job) -> None:
        if job.over:
            return
        try:
            job.result = self._llm.generate_async(**job.options)
        except Exception as error:  # a prompt beyond max_num_tokens; another worker may take more, or compute in chunks
            self._box.put(Output(job.key, (), "error", detail=one_line(error)))
            return
        try:
            await self._read(job)
        except TimeoutError:
            log.warning("TensorRT-LLM did not end an aborted request within %.0f s", END_S)
        except Exception as error:
            await self._failed(job, error)

    async def _read(self, job: Job) -> None:
        """Until its last answer. Raises TimeoutError if that does not come although nobody wants more."""
        async with asyncio.timeout(None) as job.limit:
            async for answer in job.result:
                if job.alone:
                    job.alone = None  # the other worker's blocks are here
                    if job.over:
                        self._abort(job)  # which had to wait for this
                if not job.over:
                    self._take(job, answer)

    async def _failed(self, job: Job, error: Exception) -> None:
        if type(error).__name__ != "RequestError":  # the one class of what ends requests alone, whoever is at fault
            self._box.die(f"TensorRT-LLM failed: {type(error).__name__}: {one_line(error)}")
        elif job.over:
            log.debug("an aborted request ended: %s", one_line(error))
        elif job.alone:
            log.warning("blocks of another worker did not come, computing them here: %s", one_line(error))
            job.options, job.alone, job.cached = job.alone, None, None
            await self._serve(job)
        else:
            self._box.put(Output(job.key, (), "error", detail=one_line(error)))

    def _take(self, job: Job, answer: Any) -> None:
        try:
            note = self._hand_over(job, answer) if job.hand_over else self._output(job, answer)
        except ValueError as error:
            note = Output(job.key, (), "error", detail=one_line(error))
        if note is None:
            return
        if isinstance(note, Held) or note.finish:
            job.over = True
            if not answer.finished:
                self._finish(job)
        self._box.put(note)

    def _hand_over(self, job: Job, answer: Any) -> Held | Output | None:
        if not answer.finished:
            return None
        note = handoff.held(job.key, answer, job.stops, job.end)
        if isinstance(note, Held):
            self._held[job.key] = job.result
            while len(self._held) > MAX_HELD:
                del self._held[next(iter(self._held))]
        return note

    def _output(self, job: Job, answer: Any) -> Output | None:
        (completion,) = answer.outputs
        tokens, finish = sampling.new_tokens(completion, job.told, job.stops, job.end)
        if finish == "error":
            return sampling.finished(job.key, completion)
        if len(tokens) >= job.room - job.told and finish != "stop":
            tokens, finish = tokens[: job.room - job.told], "length"
        if not tokens and not finish:
            return None
        output = Output(job.key, tokens, finish)
        if not job.told:
            cached = getattr(answer, "cached_tokens", 0) if job.cached is None else job.cached
            output.cached = int(cached or 0)
        if job.alternatives is not None and tokens:
            output.logprobs = sampling.logprobs_of(completion, job.told, tokens, job.alternatives)
        job.told += len(tokens)
        return output

    # ---- looking after it

    async def _look(self) -> None:
        """Events and statistics are polled; TensorRT-LLM pushes neither."""
        while not self._box.death:
            await self._poll()
            await asyncio.sleep(BUSY_S if self._poller.found or self._jobs else IDLE_S)

    async def _poll(self) -> None:
        stepped, events = await self._poller.look()
        self.kv.extend(events)
        if stepped and self._jobs:
            self._box.tell_moved()
        elif events:
            self._box.wake_soon()

    async def _watch(self) -> None:
        while not self._box.death:
            await asyncio.sleep(HEALTH_S)
            if reason := await ended(self._llm):
                self._box.die(reason)
