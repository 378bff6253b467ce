"""One way to drive an engine from the peer's event loop, wherever the engine runs."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Callable
from typing import Protocol

from p2pdyn.core.types import Load
from p2pdyn.engines import registry
from p2pdyn.engines.base import (
    Engine,
    EngineError,
    EngineInfo,
    EngineOptions,
    Progress,
    Sequence,
    Step,
    TransferOrder,
    death_reason,
)
from p2pdyn.engines.child import ChildRunner

TURN_S = 0.001
"""An engine whose steps take no time would else spend much of it in the loop between them."""

OnStep = Callable[[Step], None]
OnDeath = Callable[[str], None]


class Runner(Protocol):
    """Everything here is called on the event loop, and so are ``on_step`` (once an engine step) and ``on_death`` (at
    most once, after a successful start and never after close; the engine runs nothing any more)."""

    on_step: OnStep
    on_death: OnDeath
    steps: int
    last_step_s: float
    """Loop time of the last step, or of the last submit into an idle engine if that is later."""

    @property
    def load(self) -> Load:
        """Now, or as of the last step."""

    @property
    def has_work(self) -> bool:
        """Sequences are open, so steps must follow; with ``last_step_s`` it tells a stalled engine from an idle one."""

    @property
    def memory(self) -> memoryview | None:
        """The engine's KV blocks and their tags (:mod:`p2pdyn.engines.memory`), once started, if EngineInfo.block_bytes
        is not 0. Views of it may outlive the runner; what they show is nobody's then."""

    async def start(self, progress: Progress) -> EngineInfo:
        """Load. No deadline; cancelling it leaves nothing behind. Raises EngineError with a sentence."""

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue sequences; keys must never be used twice. Ignored once the engine has ended."""

    def abort(self, keys: list[int]) -> None:
        """Stop sequences: no output for these keys follows, but what the engine had already told as held or reserved
        does. Unknown keys are ignored."""

    def transfer(self, orders: list[TransferOrder]) -> None:
        """Orders of the peer's transfer, in turn with submits and aborts. Ignored once the engine has ended."""

    async def close(self) -> None:
        """End the engine and whatever it started. Idempotent, bounded in time."""


def make_runner(engine: str, options: EngineOptions, on_step: OnStep, on_death: OnDeath) -> Runner:
    """The runner for the engine called ``engine``. Raises EngineError for an unknown one."""
    kind = registry.find(engine)
    if kind.child:
        return ChildRunner(engine, kind.module, options, on_step, on_death)
    return InProcessRunner(engine, kind.module, options, on_step, on_death)


class InProcessRunner:
    """Steps an engine on the peer's own loop. Sockets are served each :data:`TURN_S`, or step if that is longer."""

    def __init__(self, name: str, module: str, options: EngineOptions, on_step: OnStep, on_death: OnDeath) -> None:
        self.on_step = on_step
        self.on_death = on_death
        self.steps = 0
        self.last_step_s = 0.0
        self._name = name
        self._module = module
        self._options = options
        self._engine: Engine | None = None
        self._open: set[int] = set()
        self._turn: asyncio.Handle | None = None
        self._turn_at = 0.0

    @property
    def engine(self) -> Engine | None:
        """The engine itself, for tests that look inside."""
        return self._engine

    @property
    def load(self) -> Load:
        return self._engine.load_report() if self._engine is not None else Load()

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    @property
    def memory(self) -> memoryview | None:
        return getattr(self._engine, "memory", None)

    async def start(self, progress: Progress) -> EngineInfo:
        loop = asyncio.get_running_loop()
        engine = await asyncio.to_thread(registry.create, self._module, self._options)  # it imports

        def report(fraction: float, what: str) -> None:
            loop.call_soon_threadsafe(progress, fraction, what)

        info = await asyncio.to_thread(engine.load, report)
        self._loop = loop
        self._engine = engine
        self.last_step_s = loop.time()
        return info

    def submit(self, sequences: list[Sequence]) -> None:
        engine = self._engine
        if engine is None:
            return
        now = time.monotonic()
        if not self._open:
            self.last_step_s = self._loop.time()
        for sequence in sequences:
            self._open.add(sequence.key)
            engine.submit(sequence, now)
        self._arm(engine)

    def abort(self, keys: list[int]) -> None:
        engine = self._engine
        if engine is None:
            return
        now = time.monotonic()
        for key in keys:
            self._open.discard(key)
            engine.abort(key, now)
        self._arm(engine)

    def transfer(self, orders: list[TransferOrder]) -> None:
        engine = self._engine
        if engine is None:
            return
        now = time.monotonic()
        for order in orders:
            engine.transfer(order, now)
        self._arm(engine)

    async def close(self) -> None:
        engine = self._stop()
        if engine is not None:
            engine.close()

    def _stop(self) -> Engine | None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        engine, self._engine = self._engine, None
        self._open.clear()
        return engine

    def _arm(self, engine: Engine) -> None:
        """Have :meth:`_step` called when the engine's next step is due."""
        now = time.monotonic()
        due = engine.next_step(now)
        if self._turn is not None:
            if due is not None and due >= self._turn_at:
                return  # an earlier turn is on its way and arms again
            self._turn.cancel()
            self._turn = None
        if due is not None:
            self._turn_at = due
            wait = due - now
            self._turn = self._loop.call_later(wait, self._step) if wait > 0 else self._loop.call_soon(self._step)

    def _step(self) -> None:
        """One step, and those that are due right behind it, for :data:`TURN_S`: then sockets are served."""
        self._turn = None
        engine = self._engine
        if engine is None:
            return
        now = time.monotonic()
        until = now + TURN_S
        while self._engine is engine:
            try:
                due = engine.next_step(now)
                step = engine.step(now) if due is not None and due <= now else None
            except Exception as error:
                self._fail(error)
                return
            if step is None:
                break
            self.steps += 1
            self.last_step_s = self._loop.time()
            self._open.difference_update(step.ended())
            self.on_step(step)
            now = time.monotonic()
            if now >= until:
                break
        if self._engine is engine:
            self._arm(engine)

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, EngineError):
            traceback.print_exception(error, file=sys.stderr)
        self._stop()
        self.on_death(death_reason(self._name, error))
