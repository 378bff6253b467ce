"""Driving an engine's runner from a loop, as the peer does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import uvloop

from p2pdyn.engines.base import EngineInfo, EngineOptions, Step, TransferNote
from p2pdyn.engines.child import ChildRunner
from p2pdyn.engines.runner import InProcessRunner, Runner
from support.engines import Result, collect

T = TypeVar("T")
NoteT = TypeVar("NoteT", bound=TransferNote)


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(30):
            return await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


class Driven:
    """A runner with what it has reported."""

    def __init__(self, kind: type[ChildRunner] | type[InProcessRunner], module: str, options: EngineOptions) -> None:
        self.results: dict[int, Result] = {}
        self.notes: list[TransferNote] = []
        self.deaths: list[str] = []
        self.progress: list[float] = []
        self.changed = asyncio.Event()
        self.runner: Runner = kind("tested", module, options, self._on_step, self._on_death)

    def _on_step(self, step: Step) -> None:
        collect(self.results, step)
        self.notes += step.transfers
        self.changed.set()

    def _on_death(self, reason: str) -> None:
        self.deaths.append(reason)
        self.changed.set()

    async def start(self) -> EngineInfo:
        return await self.runner.start(lambda fraction, what: self.progress.append(fraction))

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def finished(self, *keys: int) -> None:
        await self.until(lambda: all(key in self.results and self.results[key].finish for key in keys))

    async def told(self, kind: type[NoteT], key: int) -> NoteT:
        """The note of this kind for ``key``, once it is there."""

        def found() -> list[NoteT]:
            return [note for note in self.notes if isinstance(note, kind) and note.key == key]

        await self.until(lambda: bool(found()))
        (note,) = found()
        return note
