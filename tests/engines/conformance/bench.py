"""Engines of one subject in their host children, driven from a test as the peer's loop drives them."""

from __future__ import annotations

import asyncio
import os
import signal
from array import array
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from engines.conformance.subjects import Subject
from support.processes import in_group

from p2pdyn.core.kvblocks import KvBlocks
from p2pdyn.core.kvhash import root_seed, sequence_hashes
from p2pdyn.core.types import Load, SamplingParams
from p2pdyn.engines import registry
from p2pdyn.engines.base import (
    EngineInfo,
    EngineOptions,
    Held,
    KvEvent,
    Sequence,
    Step,
    TransferNote,
    TransferOrder,
)
from p2pdyn.engines.child import ChildRunner
from p2pdyn.net.curve import Security
from p2pdyn.net.engine_events import EngineEvents, Publisher
from p2pdyn.net.sockets import Sockets

T = TypeVar("T")
NoteT = TypeVar("NoteT", bound=TransferNote)

KEYS = count(1)
"""Never used twice, as the Runner demands."""
POLL_S = 0.05
"""A load that comes without a step is no event."""


def request(prompt: Iterable[int], output: Iterable[int] = (), **params: Any) -> Sequence:
    """A sequence with a key of its own; greedy, and past every end token, unless told otherwise."""
    tokens = array("I", prompt)
    length = len(tokens)
    tokens.extend(output)
    return Sequence(next(KEYS), tokens, length, SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **params}))


@dataclass
class Answer:
    """What an engine has told of one sequence; ``deltas`` are the numbers of tokens that came at once."""

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    cached: int = 0
    logprobs: list[Any] = field(default_factory=list)
    detail: str = ""
    deltas: list[int] = field(default_factory=list)


class Bench:
    """One event loop that runs only while a test waits."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.folder = folder
        made = folder / "model"
        made.mkdir()
        self.model = subject.model(made)
        self.engines: list[Driven] = []
        self._begun: dict[str, Driven] = {}
        self._loop = asyncio.Runner(loop_factory=uvloop.new_event_loop)

    def run(self, work: Awaitable[T], seconds: float) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(seconds):
                return await work

        return self._loop.run(bounded())

    def begin(self, *roles: str) -> None:
        """Have an engine for each role load, beside each other and beside what runs until they are started."""
        self._begun |= {role: self.spawn(Driven(self, role)) for role in roles}

    def start(self, *roles: str) -> list[Driven]:
        """An engine for each role, loaded."""
        self.begin(*(role for role in roles if role not in self._begun))
        made = [self._begun.pop(role) for role in roles]
        self.loaded(*made)
        return made

    def spawn(self, engine: Driven) -> Driven:
        """Have it begin to load, in a process of its own."""
        self.engines.append(engine)

        async def body() -> None:
            engine.starting = asyncio.create_task(engine.start())
            while not (engine.progress or engine.starting.done()):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)  # until its options have arrived

        with pytest.MonkeyPatch.context() as patch:  # no longer: other engines' tests run while these are up
            for name, value in self.subject.environment.items():
                patch.setenv(name, value)
            self.run(body(), self.subject.start_s)
        return engine

    def loaded(self, *engines: Driven) -> None:
        """Wait for them. Raises what the first one says that could not."""

        async def together() -> None:
            await asyncio.gather(*(engine.starting for engine in engines if engine.starting is not None))

        self.run(together(), self.subject.start_s)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self._loop.close()


class Driven:
    """One engine and all that it has told. Whatever waits fails by the subject's patience."""

    info: EngineInfo

    def __init__(self, bench: Bench, role: str, life: int = 1) -> None:
        self.subject = bench.subject
        self.answers: dict[int, Answer] = {}
        self.notes: list[TransferNote] = []
        self.deaths: list[str] = []
        self.progress: list[float] = []
        self.starting: asyncio.Task[None] | None = None
        self.folder = bench.folder / role
        self.folder.mkdir(exist_ok=True)
        self._bench = bench
        self._life = life
        self._role = role
        self._changed = asyncio.Event()
        self._blocks: KvBlocks | None = None
        self._sockets: Sockets | None = None
        self._events: EngineEvents | None = None
        number = len(bench.engines)
        options = EngineOptions(
            bench.model,
            None,
            self.subject.args,
            offline=True,
            data_dir=self.folder,
            node=f"{number:016x}",
            epoch=life,
            role=role,
        )
        module = registry.find(self.subject.engine).module
        self.runner = ChildRunner(self.subject.engine, module, options, self._on_step, self._on_death)

    async def start(self) -> None:
        self.info = info = await self.runner.start(lambda fraction, what: self.progress.append(fraction))
        self._blocks = KvBlocks(info.block_size)
        if info.publishers:
            self._sockets = Sockets(Security.insecure())
            places = [Publisher(*where, rank=rank) for rank, where in enumerate(info.publishers)]
            self._events = EngineEvents(
                self._sockets, places, info.block_size, lambda rank, events: self._on_events(events)
            )
            while any(status.state != "exact" for status in self._events.status()):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)

    def again(self) -> Driven:
        """The next life of this one: another process with the same arguments and folder."""
        later = self._bench.spawn(Driven(self._bench, self._role, self._life + 1))
        self._bench.loaded(later)
        return later

    def close(self) -> None:
        if self.starting is not None:
            self.starting.cancel()
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None
        self._bench.run(self.runner.close(), 20)

    def needs(self, *what: str) -> None:
        """Skip the test if the subject says that the engine cannot."""
        for one in what:
            if one in self.subject.cannot:
                pytest.skip(f"{self.subject.name} has no {one!r}: {self.subject.cannot[one]}")

    # ---- what it tells

    def _on_step(self, step: Step) -> None:
        keys = [output.key for output in step.outputs]
        assert len(keys) == len(set(keys)), "two outputs of one sequence in one step"
        for output in step.outputs:
            answer = self.answers.setdefault(output.key, Answer())
            assert not answer.finish, "output after the end"
            assert not (output.cached and answer.tokens), "cached is told with the first output"
            answer.tokens += output.tokens
            answer.finish, answer.detail = output.finish, output.detail
            answer.cached += output.cached
            answer.logprobs += output.logprobs
            if output.tokens:
                answer.deltas.append(len(output.tokens))
        self.notes += step.transfers
        self._on_events(step.kv)

    def _on_events(self, events: Iterable[KvEvent]) -> None:
        assert self._blocks is not None
        for event in events:
            self._blocks.apply(event)
        assert self._blocks.orphans == 0, "a block came before its parent, or with tokens that do not fill it"
        self._changed.set()

    def _on_death(self, reason: str) -> None:
        self.deaths.append(reason)
        self._changed.set()

    @property
    def load(self) -> Load:
        return self.runner.load

    @property
    def group(self) -> int:
        """Process group of the host child and all that it has started."""
        assert self.runner.pid is not None
        return self.runner.pid

    # ---- what it is asked

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Serve the engine until ``condition`` holds; ``what`` is said if that takes too long."""

        async def wait() -> None:
            while not condition():
                self._changed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), POLL_S)

        try:
            self._bench.run(wait(), self.subject.patience_s)
        except TimeoutError:
            raise AssertionError(f"not within {self.subject.patience_s:g} s: {what}; {self.deaths}") from None

    def submit(self, *sequences: Sequence) -> None:
        self.runner.submit(list(sequences))

    def abort(self, *sequences: Sequence) -> None:
        self.runner.abort([one.key for one in sequences])

    def order(self, *orders: TransferOrder) -> None:
        self.runner.transfer(list(orders))

    def answer(self, sequence: Sequence) -> Answer:
        """Everything it says of what was submitted."""
        self.until(lambda: sequence.key in self.answers and self.answers[sequence.key].finish, "the answer's end")
        return self.answers[sequence.key]

    def begun(self, sequence: Sequence, tokens: int = 1) -> None:
        """Wait for the first tokens."""
        self.until(lambda: len(self.answers.get(sequence.key, Answer()).tokens) >= tokens, "the first tokens")

    def ask(self, *sequences: Sequence) -> list[Answer]:
        """Submit these together, and wait for all."""
        self.submit(*sequences)
        return [self.answer(sequence) for sequence in sequences]

    def text(self, prompt: Iterable[int], output: Iterable[int] = (), **params: Any) -> list[int]:
        """The tokens of one sequence, run alone."""
        return self.ask(request(prompt, output, **params))[0].tokens

    def told(self, kind: type[NoteT], sequence: Sequence) -> NoteT:
        """The first note of this kind for ``sequence``, once it is there."""

        def found() -> list[NoteT]:
            return [note for note in self.notes if isinstance(note, kind) and note.key == sequence.key]

        self.until(found, f"a {kind.__name__}")
        return found()[0]

    def handed_over(self, sequence: Sequence) -> None:
        """Wait for the end of a hand-over that was told before it was computed, as SGLang's."""

        def over() -> bool:
            return any(isinstance(note, Held) and note.key == sequence.key and note.computed for note in self.notes)

        self.until(over, "the end of the hand-over")

    def nothing_is_used(self) -> None:
        """Wait until no sequence is open and the engine says that none, no lease and no reservation holds anything."""

        def nothing() -> bool:
            load = self.load
            return not self.runner.has_work and (
                load.active_requests,
                load.active_blocks,
                load.queued,
                load.prefill_tokens_queued,
            ) == (0, 0, 0, 0)

        self.until(nothing, "an idle engine without blocks in use")

    # ---- its cache

    def stored(self, prompt: Iterable[int], salt: str = "") -> int:
        """Tokens of the longest prefix whose blocks the events say are cached, on the device."""
        assert self._blocks is not None
        held, size = self._blocks.held(0), self.info.block_size
        hashes = sequence_hashes(array("I", prompt).tobytes(), size, root_seed("", salt))
        return size * sum(1 for _ in takewhile(held.__contains__, hashes))

    def stored_blocks(self) -> int:
        assert self._blocks is not None
        return len(self._blocks)

    def settle(self) -> None:
        """Have all events so far arrive: they come in order, so the newest block is told last."""
        marker = [97 + next(KEYS) // 26**place % 26 for place in range(8)]
        prompt = (marker * self.info.block_size)[: self.info.block_size + 1]
        self.ask(request(prompt, max_tokens=1))
        self.until(lambda: self.stored(prompt), "the event of the newest block")

    # ---- faults

    def freeze(self) -> None:
        os.killpg(self.group, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.group, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self.group, signal.SIGKILL)

    def processes(self) -> list[int]:
        """The living ones of its group."""
        return in_group(self.group)


def like(sequence: Sequence, **fields: Any) -> Sequence:
    """The same request under a key of its own."""
    return replace(sequence, key=next(KEYS), tokens=array("I", sequence.tokens), **fields)


def same_tokens(engine: Driven, sequence: Sequence, expected: list[int], got: list[int]) -> None:
    """Assert that two greedy answers are the same, but for what the subject says of ties."""
    if got == expected or not engine.subject.tie:
        assert got == expected
        return
    engine.needs("logprobs")
    at = next(i for i, (one, other) in enumerate(zip(expected, got, strict=True)) if one != other)
    ahead = like(sequence, prompt_len=sequence.prompt_len)
    ahead.tokens.extend(expected[:at])
    ahead.params = replace(sequence.params, max_tokens=at + 1, logprobs=2)
    ((_, ((_, best), (_, second))),) = engine.ask(ahead)[0].logprobs
    assert best - second < engine.subject.tie, f"another token at {at}: {expected} and {got}"
