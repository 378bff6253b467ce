"""AsyncLLM on an event loop in a thread of its own.

Everything public here is called from the engine's thread; what vLLM answers is put into ``box``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from p2pdyn.engines.base import Output
from p2pdyn.engines.hosted import boot_time, one_line
from p2pdyn.engines.postbox import Postbox
from p2pdyn.engines.vllm import handoff
from p2pdyn.engines.vllm.arguments import LEASE_S
from p2pdyn.engines.vllm.sampling import blames_request, from_vllm, warm_params

log = logging.getLogger(__name__)

ENDED = "vLLM's engine core has ended"
WATCH_S = 1.0
JUMP_S = LEASE_S / 2
"""A clock that advanced this far between two looks means that this process stood still."""
RESET_S = 2.0 * LEASE_S
NEWS_S = 10.0
TELL_S = 0.2
CLOSE_S = 1.0
CALL_S = 5.0
WARM_TOKENS = 512
WARM_S = 120.0


@dataclass(slots=True)
class Job:
    """One sequence under way. ``silent``: it has produced nothing yet."""

    key: int
    prompt: dict[str, Any]
    params: Any
    hand_over: bool
    remote: bool
    alternatives: int | None
    options: dict[str, Any] = field(default_factory=dict)
    silent: bool = True


class Bridge:
    """``build`` makes the AsyncLLM; it is called in the loop's thread and may take minutes."""

    def __init__(self, build: Callable[[], Any], box: Postbox, news: Callable[[], str]) -> None:
        self.llm: Any = None
        self.failure: Exception | None = None
        self.started = threading.Event()
        """Either ``llm`` is there, or ``failure``."""
        self._build = build
        self._box = box
        self._news = news
        self._jobs: dict[int, tuple[Job, asyncio.Task[None]]] = {}
        self._again: dict[int, Job] = {}
        """To be computed here once the prefix cache is empty."""
        self._telling: asyncio.TimerHandle | None = None
        self._seen = 0.0
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._open: asyncio.Event
        """Cleared while the prefix cache must not be used."""
        self._thread = threading.Thread(target=self._run_thread, name="vllm", daemon=True)
        self._thread.start()

    # ---- the engine's thread

    def submit(self, job: Job) -> None:
        self._loop.call_soon_threadsafe(self._begin, job)

    def abort(self, key: int) -> None:
        self._loop.call_soon_threadsafe(self._cancel, key)

    def release(self, request: str) -> None:
        """Let the blocks go that a hand-over holds; ``request`` is vLLM's name of it."""
        self._loop.call_soon_threadsafe(lambda: self._keep(self._release(request)))

    def close(self) -> None:
        if self.llm is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(CLOSE_S + 0.5)

    # ---- the loop's thread

    def _run_thread(self) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._open = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._background: set[asyncio.Task[Any]] = set()
        try:
            llm = self._build()
            if llm.vllm_config.device_config.device_type == "cpu":
                await self._mend_seeds(llm)
            await self._warm(llm)
            self.llm = llm
        except Exception as error:
            self.failure = error
        self.started.set()
        if self.llm is None:
            return
        self._seen = boot_time()
        self._keep(self._watch())
        await self._stop.wait()
        for _, task in self._jobs.values():
            task.cancel()
        self.llm.shutdown(timeout=CLOSE_S)

    async def _mend_seeds(self, llm: Any) -> None:
        try:
            async with asyncio.timeout(WARM_S):
                await llm.collective_rpc("p2pdyn_seeds")
        except Exception as error:  # of whatever kind it was in the worker
            log.warning(
                "sampled requests with long prompts will end this engine: derive the class that --worker-extension-cls "
                "names from p2pdyn.engines.vllm.worker.Extension (%s)",
                one_line(error),
            )

    async def _warm(self, llm: Any) -> None:
        """Run a prompt, twice, and forget it: the first one takes several times as long as all others, and the speeds
        that routers go by are measured from the first request on."""
        length = min(WARM_TOKENS, llm.vllm_config.model_config.max_model_len - 8)
        for turn in range(2):
            prompt = {"type": "token", "prompt_token_ids": [turn] * max(1, length)}
            async with asyncio.timeout(WARM_S):
                async for _ in llm.generate(prompt, warm_params(), f"warm-{turn}"):
                    pass
        async with asyncio.timeout(CALL_S):
            await llm.reset_prefix_cache()

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _begin(self, job: Job) -> None:
        task = asyncio.create_task(self._serve(job))
        self._jobs[job.key] = job, task
        task.add_done_callback(lambda done: self._ended(job, done))

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        if job.key in self._jobs and self._jobs[job.key][1] is task:
            del self._jobs[job.key]

    def _cancel(self, key: int) -> None:
        self._again.pop(key, None)
        known = self._jobs.pop(key, None)
        if known is not None:
            known[1].cancel()

    async def _serve(self, job: Job) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._open.wait()
            async with aclosing(self.llm.generate(job.prompt, job.params, str(job.key), **job.options)) as results:
                async for result in results:
                    if job.silent and job.remote and self._stood_still():
                        return  # _recover has it now
                    self._take(job, result)
        except EngineDeadError:
            self._box.die(ENDED)
        except Exception as error:
            cause = error.__cause__ or error
            finish = "invalid" if job.silent and blames_request(cause) else "error"
            self._box.put(Output(job.key, (), finish, detail=one_line(cause)))

    def _take(self, job: Job, result: Any) -> None:
        first, job.silent = job.silent, False
        if not job.hand_over:
            self._box.put(from_vllm(job.key, result, first, job.alternatives))
        elif result.finished:
            self._box.put(handoff.held(job.key, result))

    def core_stepped(self) -> None:
        """A step of vLLM's core; the last one of several is always told."""
        if self._telling is None:
            self._telling = self._loop.call_later(TELL_S, self._tell)

    def _tell(self) -> None:
        self._telling = None
        self._box.tell_moved()

    # ---- watch

    async def _watch(self) -> None:
        told = self._seen
        while not self._box.death:
            await asyncio.sleep(WATCH_S)
            self._stood_still()
            if self.llm.errored:
                self._box.die(ENDED)
            if self._seen - told >= NEWS_S:
                told = self._seen
                if line := self._news():
                    log.info("%s", line)

    def _stood_still(self) -> bool:
        """Whether this process was stopped just now. Then what is being pulled may be another prompt's: the other side
        has waited in vain, and given its blocks away."""
        now = boot_time()
        gap, self._seen = now - self._seen, now
        if gap < JUMP_S:
            return False
        pulls = [self._jobs.pop(job.key) for job, _ in list(self._jobs.values()) if job.remote and job.silent]
        if pulls:
            log.warning("this process stood still for %.0f s: %d prompts are computed here instead", gap, len(pulls))
            self._open.clear()
            self._again.update((job.key, job) for job, _ in pulls)
            self._keep(self._recover([task for _, task in pulls]))
        return bool(pulls)

    async def _recover(self, pulls: list[asyncio.Task[None]]) -> None:
        """Drop what was being pulled and all that is cached, then compute those prompts here."""
        for pull in pulls:
            pull.cancel()
        await asyncio.wait(pulls, timeout=CALL_S)
        deadline = self._loop.time() + RESET_S
        while not await self._reset():
            if self._loop.time() > deadline:
                self._box.die("vLLM did not empty its prefix cache after this process had stood still")
                return
            await asyncio.sleep(0.1)
        self._open.set()
        again, self._again = self._again, {}
        for job in again.values():
            job.remote = False
            job.params.extra_args = None
            self._begin(job)

    async def _reset(self) -> bool:
        try:
            async with asyncio.timeout(CALL_S):
                return bool(await self.llm.reset_prefix_cache(reset_running_requests=True))
        except Exception:  # blocks that are still being written to
            return False

    async def _release(self, request: str) -> None:
        try:
            async with asyncio.timeout(CALL_S):
                done = await self.llm.collective_rpc("p2pdyn_release", args=(request,))
        except Exception as error:
            done = [error]
        if True not in done:
            log.debug("request %s ends with its lease: %s", request, done)
