"""When a supervisor starts, restarts and stops its workers.

- A worker that ends is started again after 1, 2, 4, ... 30 s, for ever; one that was ready for a minute starts over at
  1 s.
- A worker that calls its own configuration wrong before the cluster was ever ready fails the supervisor: no restart
  mends that, and whoever typed it is still looking.
- A worker that ends with exit code 0 did as it was asked (`p2pdyn drain`, SIGTERM): it stays down until Revive.
- A stop asks every worker to finish what runs; the second ends it at once; after a deadline they are killed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from p2pdyn.core.drain import LIMIT_S

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
STEADY_S = 60.0
"""Ready for this long: the next failure is a new story."""
DRAIN_S = LIMIT_S + 5.0
"""From the first stop to SIGKILL. A node drains for LIMIT_S at most, and then says good-bye."""
HURRY_S = 3.0
"""The same from the second stop."""
USAGE = 2
"""A node's exit code for bad usage or configuration."""


@dataclass(frozen=True, slots=True)
class Begin:
    pass


@dataclass(frozen=True, slots=True)
class BecameReady:
    worker: int


@dataclass(frozen=True, slots=True)
class Exited:
    """``code`` as asyncio gives it: negative for a signal."""

    worker: int
    code: int


@dataclass(frozen=True, slots=True)
class Stop:
    pass


@dataclass(frozen=True, slots=True)
class Revive:
    """Start again what was drained."""


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = Begin | BecameReady | Exited | Stop | Revive | Tick


@dataclass(frozen=True, slots=True)
class Spawn:
    worker: int


@dataclass(frozen=True, slots=True)
class Terminate:
    worker: int


@dataclass(frozen=True, slots=True)
class Kill:
    worker: int


@dataclass(frozen=True, slots=True)
class AllReady:
    """Told once."""


@dataclass(frozen=True, slots=True)
class Finished:
    """No worker runs and none will."""

    code: int


@dataclass(frozen=True, slots=True)
class Say:
    worker: int
    text: str


Action = Spawn | Terminate | Kill | AllReady | Finished | Say


@dataclass(slots=True)
class _Worker:
    state: Literal["waiting", "starting", "ready", "drained", "ended"] = "ended"
    since: float = 0.0
    failures: int = 0

    @property
    def runs(self) -> bool:
        return self.state in ("starting", "ready")


class Supervision:
    """Pure: :meth:`handle` an event at ``now`` (seconds, monotonic), again with Tick by :meth:`next_deadline`."""

    def __init__(self, workers: int) -> None:
        self._workers = [_Worker() for _ in range(workers)]
        self._told = False
        self._stops = 0
        self._kill_at: float | None = None
        self._code = 0

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Begin():
                return [] if self._stops else [self._spawn(i, now) for i in range(len(self._workers))]
            case BecameReady(worker):
                return self._became_ready(worker, now)
            case Exited(worker, code):
                return self._exited(worker, code, now)
            case Stop():
                return self._stop(now)
            case Revive():
                drained = [i for i, worker in enumerate(self._workers) if worker.state == "drained"]
                return [] if self._stops else [self._spawn(i, now) for i in drained]
            case Tick():
                return self._tick(now)

    @property
    def running(self) -> int:
        return sum(worker.runs for worker in self._workers)

    @property
    def stops(self) -> int:
        """How often it has been asked to."""
        return self._stops

    def next_deadline(self) -> float | None:
        if self._kill_at is not None:
            return self._kill_at
        return min((w.since for w in self._workers if w.state == "waiting"), default=None)

    def _spawn(self, i: int, now: float) -> Action:
        self._workers[i].state, self._workers[i].since = "starting", now
        return Spawn(i)

    def _became_ready(self, i: int, now: float) -> list[Action]:
        worker = self._workers[i]
        if worker.state != "starting":
            return []
        worker.state, worker.since = "ready", now
        if self._told or self._stops or any(w.state not in ("ready", "drained") for w in self._workers):
            return []
        self._told = True
        return [AllReady()]

    def _exited(self, i: int, code: int, now: float) -> list[Action]:
        worker = self._workers[i]
        if not worker.runs:
            return []
        if worker.state == "ready" and now - worker.since >= STEADY_S:
            worker.failures = 0
        worker.state = "ended"
        if self._stops:
            return self._finished()
        if code == USAGE and not self._told:
            self._code = USAGE
            return [Say(i, "cannot start as configured: its own message above says why"), *self._stop(now)]
        if code == 0:
            worker.state, worker.failures = "drained", 0
            return [Say(i, "was drained: it stays down until this node gets SIGHUP, or is started again")]
        delay = BACKOFF_S[min(worker.failures, len(BACKOFF_S) - 1)]
        worker.failures += 1
        worker.state, worker.since = "waiting", now + delay
        again = f"; failure {worker.failures} in a row" if worker.failures > 1 else ""
        return [Say(i, f"ended ({cause(code)}){again}; starts again in {delay:g} s")]

    def _stop(self, now: float) -> list[Action]:
        self._stops += 1
        self._kill_at = now + (DRAIN_S if self._stops == 1 else HURRY_S)
        for worker in self._workers:
            if not worker.runs:
                worker.state = "ended"
        return self._all(Terminate) or self._finished()

    def _tick(self, now: float) -> list[Action]:
        if self._kill_at is not None:
            if now < self._kill_at:
                return []
            self._kill_at = now + HURRY_S
            return self._all(Kill)
        return [self._spawn(i, now) for i, w in enumerate(self._workers) if w.state == "waiting" and w.since <= now]

    def _all(self, action: Callable[[int], Action]) -> list[Action]:
        return [action(i) for i, w in enumerate(self._workers) if w.runs]

    def _finished(self) -> list[Action]:
        if any(w.runs for w in self._workers):
            return []
        self._kill_at = None
        return [Finished(self._code)]


def cause(code: int) -> str:
    """An exit code in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
