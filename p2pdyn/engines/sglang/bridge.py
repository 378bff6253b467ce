"""sglang.Engine on an event loop in a thread of its own.

Everything public here is called from the engine's thread; what SGLang answers is put into ``box``.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

from p2pdyn.engines.base import Held, Output
from p2pdyn.engines.hosted import boot_time, one_line
from p2pdyn.engines.postbox import Postbox
from p2pdyn.engines.sglang import handoff
from p2pdyn.engines.sglang.arguments import RELEASE_S
from p2pdyn.engines.sglang.load import Loads
from p2pdyn.engines.sglang.sampling import cut, from_sglang

STILL_S = RELEASE_S / 2
"""A clock that advanced this far between two looks means that this process stood still."""
LOOK_S = 0.2
"""Between two looks at the schedulers' load, while anything is open."""
CALL_S = 5.0
CLOSE_S = 1.0
WARM_TOKENS = 512
WARM_S = 120.0


@dataclass(slots=True)
class Job:
    """One sequence under way. ``ask`` are async_generate's arguments; ``held``: what to tell of a prompt that is handed
    over; ``stops``: tokens at which we end it; ``silent``: nothing has come of it yet."""

    key: int
    ask: dict[str, Any]
    alternatives: int | None = None
    stops: frozenset[int] = frozenset()
    held: Held | None = None
    silent: bool = True

    @property
    def rid(self) -> str:
        """SGLang's name of it. All are of one length, for SGLang aborts whatever begins with a name."""
        return f"p2p{self.key:021x}"


class Bridge:
    """``build`` makes the sglang.Engine; it is called in the loop's thread and may take minutes. ``rooms``: it does
    prefill or decode alone."""

    def __init__(self, build: Callable[[], Any], box: Postbox, rooms: bool) -> None:
        self.engine: Any = None
        self.takes: frozenset[str] = frozenset()
        """The arguments of this version's async_generate."""
        self.loads = Loads()
        self.failure: Exception | None = None
        self.started = threading.Event()
        """Either ``engine`` is there, or ``failure``."""
        self._build = build
        self._box = box
        self._rooms = rooms
        self._jobs: dict[int, tuple[Job, asyncio.Task[None]]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=self._run_thread, name="sglang", daemon=True)
        self._thread.start()

    # ---- the engine's thread

    def submit(self, job: Job) -> None:
        self._loop.call_soon_threadsafe(self._begin, job)

    def abort(self, key: int) -> None:
        self._loop.call_soon_threadsafe(self._cancel, key)

    def close(self) -> None:
        """By force: SGLang's own way takes seconds, and nothing of it is wanted any more."""
        if self.engine is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(CLOSE_S)
        for child in multiprocessing.active_children():
            child.kill()
        for child in multiprocessing.active_children():
            child.join(CLOSE_S)

    # ---- the loop's thread

    def _run_thread(self) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            engine = self._build()
            self.takes = frozenset(signature(engine.async_generate).parameters)
            await self._warm(engine)
            self.loads.update(await engine.tokenizer_manager.get_loads())
            self.engine = engine
        except Exception as error:
            self.failure = error
        self.started.set()
        if self.engine is None:
            return
        self._watch(self.engine)
        await self._stop.wait()

    async def _warm(self, engine: Any) -> None:
        """Run a prompt, twice, and forget it: the first one takes several times as long as all others, and the speeds
        that routers go by are measured from the first request on."""
        length = max(1, min(WARM_TOKENS, engine.tokenizer_manager.context_len - 16))
        for turn in range(2):
            room = handoff.Room(handoff.FAKE_HOST, 1, turn).arguments() if self._rooms else {}
            params = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}
            ask = {"input_ids": [turn] * length, "sampling_params": params, "rid": f"warm-{turn}", **room}
            async with asyncio.timeout(WARM_S):
                await engine.async_generate(**ask)
        with suppress(TimeoutError):
            async with asyncio.timeout(CALL_S):
                await engine.tokenizer_manager.flush_cache()

    def _watch(self, engine: Any) -> None:
        """Notice the end of any of SGLang's processes at once."""
        for pid in engine.get_all_child_pids():
            try:
                process = os.pidfd_open(pid)
            except ProcessLookupError:
                self._box.die(f"SGLang's process {pid} has ended")
                continue
            self._loop.add_reader(process, self._ended, process, pid)

    def _ended(self, process: int, pid: int) -> None:
        self._loop.remove_reader(process)
        os.close(process)
        self._box.die(f"SGLang's process {pid} has ended")

    # ---- sequences

    def _begin(self, job: Job) -> None:
        task = asyncio.create_task(self._serve(job))
        self._jobs[job.key] = job, task
        task.add_done_callback(lambda done: self._over(job))
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())

    def _over(self, job: Job) -> None:
        self._jobs.pop(job.key, None)
        if job.held is not None:  # of one that came to nothing, nothing was computed
            self._box.put(Held(job.key, cached=len(job.ask["input_ids"]) if job.silent else job.held.cached))

    def _cancel(self, key: int) -> None:
        """SGLang aborts what has reached its scheduler, and forgets what has not when the task ends."""
        known = self._jobs.get(key)
        if known is not None:
            job, task = known
            self.engine.tokenizer_manager.abort_request(job.rid)
            task.cancel()

    async def _serve(self, job: Job) -> None:
        try:
            if job.held is not None:
                self._box.put(job.held)
            stream = await self.engine.async_generate(**job.ask, rid=job.rid, stream=True)
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    if self._take(job, chunk):
                        return
        except Exception as error:
            if job.held is None:
                finish = "invalid" if job.silent and isinstance(error, ValueError) else "error"
                self._box.put(Output(job.key, (), finish, detail=one_line(error)))

    def _take(self, job: Job, chunk: dict[str, Any]) -> bool:
        """Whether nothing more of it is wanted."""
        meta = chunk["meta_info"]
        if job.held is not None:
            ended = meta["finish_reason"]
            if ended is None or ended["type"] != "abort":
                job.held, job.silent = Held(job.key, cached=meta.get("cached_tokens") or 0), False
            return False
        first, job.silent = job.silent, False
        output = from_sglang(job.key, chunk, first, job.alternatives)
        if job.stops and not output.finish:
            output = cut(output, job.stops)
            if output.finish:
                self.engine.tokenizer_manager.abort_request(job.rid)
        self._box.put(output)
        return bool(output.finish)

    async def _look(self) -> None:
        """At the load, until all is over and the schedulers say so; and at the clock: a prefill that was stopped for
        long may write into blocks that are others' by now."""
        seen = boot_time()
        while not self._box.death:
            before, seen = seen, boot_time()
            if seen - before > STILL_S and any(job.held is not None for job, _ in self._jobs.values()):
                self._box.die(
                    f"this process stood still for {seen - before:.0f} s while others waited for its KV blocks"
                )
            with suppress(Exception):  # of a version that tells it otherwise: the load is unknown then
                if self.loads.update(await _soon(self.engine.tokenizer_manager.get_loads())):
                    self._box.tell_moved()
            if not self._jobs and self.loads.settled:
                break
            await asyncio.sleep(LOOK_S)
        self._looking = None


async def _soon(call: Awaitable[Any]) -> Any:
    async with asyncio.timeout(CALL_S):
        return await call
