"""vLLM engines for tests, each in its host child as a node has it; a test without vLLM installed is skipped."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pytest
import uvloop

from p2pdyn.engines.base import EngineInfo, EngineOptions, Held, Sequence, Step
from p2pdyn.engines.child import ChildRunner
from support.engines import Result

T = TypeVar("T")

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_COLOR": "0",
    # The engine core runs the model itself, as on a GPU. Else it spins while a process of its own does, and that one
    # for a second after each step: two such engines leave nothing of two cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
ARGS = ("--enforce-eager", "--dtype", "float32", "--max-num-seqs", "4")
WAIT_S = 60.0
START_S = 280.0
"""Loading imports vLLM in two processes one after the other; SGLang in three, and two such engines at a time."""


def installed(*distributions: str) -> bool:
    """Whether one of them is; looking for modules would find folders of tests with these names."""
    for name in distributions:
        try:
            return bool(version(name))
        except PackageNotFoundError:
            continue
    return False


needs_vllm = pytest.mark.skipif(not installed("vllm", "vllm-cpu"), reason="vLLM is not installed: tox -e vllm")


@dataclass
class Vllm:
    """One engine and all that it has told."""

    runner: ChildRunner
    info: EngineInfo | None = None
    results: dict[int, Result] = field(default_factory=dict)
    held: dict[int, Held] = field(default_factory=dict)
    deaths: list[str] = field(default_factory=list)
    progress: list[tuple[float, str]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    starting: asyncio.Task[None] | None = None

    @property
    def group(self) -> int:
        """Process group of the host child and all that it has started."""
        assert self.runner.pid is not None
        return self.runner.pid

    def on_step(self, step: Step) -> None:
        for output in step.outputs:
            result = self.results.setdefault(output.key, Result())
            assert not result.finish, "output after the end"
            result.tokens += output.tokens
            result.finish, result.detail = output.finish, output.detail
            result.cached += output.cached
            result.logprobs += output.logprobs
            result.steps += 1
        for note in step.transfers:
            assert isinstance(note, Held)
            self.held[note.key] = note
        self.changed.set()

    def on_death(self, reason: str) -> None:
        self.deaths.append(reason)
        self.changed.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for what changes with a step, a load report or a death."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.changed.clear()
                with suppress(TimeoutError):  # load reports come without a call
                    await asyncio.wait_for(self.changed.wait(), 0.1)

    async def finished(self, *sequences: Sequence) -> list[Result]:
        """Submit these, and wait for their ends."""
        self.runner.submit(list(sequences))
        keys = [one.key for one in sequences]
        await self.until(lambda: all(key in self.results and self.results[key].finish for key in keys))
        return [self.results[key] for key in keys]


class Lab:
    """Engines on one event loop that runs only while a test does."""

    def __init__(self, folder: Path, model: Path, kind: str = "vllm", args: tuple[str, ...] = ARGS) -> None:
        self.folder = folder
        self.model = model
        self.kind = kind
        self.args = args
        self.engines: list[Vllm] = []
        self._loop = asyncio.Runner(loop_factory=uvloop.new_event_loop)

    def run(self, work: Awaitable[T], timeout: float = 120.0) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(timeout):
                return await work

        return self._loop.run(bounded())

    def make(self, *args: str, **options: Any) -> Vllm:
        """An engine that is not started yet."""
        folder = self.folder / f"engine{len(self.engines)}"
        folder.mkdir()
        told: list[Vllm] = []
        runner = ChildRunner(
            self.kind,
            f"p2pdyn.engines.{self.kind}",
            EngineOptions(str(self.model), None, (*self.args, *args), offline=True, data_dir=folder, **options),
            lambda step: told[0].on_step(step),
            lambda reason: told[0].on_death(reason),
        )
        told.append(Vllm(runner))
        self.engines.append(told[0])
        return told[0]

    def begin(self, engines: Iterable[Vllm]) -> None:
        """Have them load beside each other, whether or not the loop runs meanwhile."""

        async def body() -> None:
            for engine in engines:
                engine.starting = asyncio.create_task(self._start(engine))
                await engine.until(lambda one=engine: one.progress or one.starting.done())

        self.run(body())

    def start(self, engines: Iterable[Vllm]) -> None:
        """Wait until they have loaded; what was not begun begins now. Raises what the first one says that could not."""
        engines = list(engines)
        self.begin(engine for engine in engines if engine.starting is None)

        async def loaded() -> None:
            await asyncio.gather(*(engine.starting for engine in engines if engine.starting is not None))

        self.run(loaded(), START_S)

    async def _start(self, engine: Vllm) -> None:
        def progress(fraction: float, what: str) -> None:
            engine.progress.append((fraction, what))
            engine.changed.set()

        engine.info = await engine.runner.start(progress)

    def end(self, engines: Iterable[Vllm]) -> None:
        """Close them; nothing of them is left for those that come behind."""
        for engine in engines:
            if engine.starting is not None:
                engine.starting.cancel()
            self.run(engine.runner.close())

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.end(self.engines)
        self._loop.close()


def signal_group(engine: Vllm, number: int) -> None:
    """To the host child and all that it has started."""
    os.killpg(engine.group, number)
