"""Every open request of one frontend: who works on it, what has arrived, what happens when a worker is lost.

States of a flight and the way out of each (one release for all of them, :meth:`Flights._release`):

    waiting   no routable worker yet      -> running, failed (deadline), cancelled
    running   a worker has it             -> done, failed, cancelled, running on another worker (migration), waiting

A token frame carries (attempt, offset of its first token).  An older attempt is dropped; a hole in the offsets counts
as loss of the worker for that request, because ZeroMQ drops frames at the high-water mark without telling.

Migration sends the prompt and all tokens received so far to another worker: exact for greedy, seeded and stopped
requests, since engines count tokens from ``prompt_len``.  What cannot be continued exactly (``Job.resumable`` False) is
rerun while the client has seen nothing, and fails with ``worker_lost`` after that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from p2pdyn.core.request import Failure, Job, Logprobs, Outcome, Rejected, Sink
from p2pdyn.core.router_simple import Policy, Target
from p2pdyn.core.types import Load, NodeId
from p2pdyn.wire.requests import Row

MIGRATION_LIMIT = 3
"""Attempts after the first. A request that kills its workers must stop before it has killed them all."""

WAIT_S = 5.0
"""Seconds a request waits for a routable worker (links are opened at the first request for a model)."""

MAX_WAITING = 1024
"""Requests waiting for a worker; one more is answered 429."""


class Dispatch(NamedTuple):
    """Send ``tokens`` (prompt and output so far) to ``worker`` as this attempt."""

    worker: NodeId
    rid: int
    attempt: int
    job: Job
    tokens: array[int]


class Abandon(NamedTuple):
    """Tell ``worker`` to stop (rid, attempt)."""

    worker: NodeId
    rid: int
    attempt: int


Action = Dispatch | Abandon


@dataclass(slots=True)
class Flight:
    rid: int
    job: Job
    sink: Sink
    since: float
    """When it was dispatched, or began to wait."""
    worker: NodeId | None = None
    attempt: int = 0
    received: int = 0
    output: array[int] = field(default_factory=lambda: array("I"))
    workers: list[NodeId] = field(default_factory=list)
    migrations: int = 0


class Flights:
    """Pure; the sinks that it calls belong to the caller. ``targets`` is who may be routed to now, by model."""

    def __init__(self, policy: Policy, read_logprobs: Callable[[bytes], Logprobs]) -> None:
        self._policy = policy
        self._read_logprobs = read_logprobs
        self._next_rid = 1
        self.open: dict[int, Flight] = {}
        self._waiting: dict[int, Flight] = {}
        self._at: dict[NodeId, dict[int, Flight]] = {}
        self._targets: dict[NodeId, Target] = {}
        self._serving: dict[str, list[NodeId]] = {}
        self.migrations = 0
        self.holes = 0
        self.stale = 0

    # Who may be routed to.

    def routable(self, serving: dict[str, list[NodeId]], now: float) -> list[Action]:
        """Take over who serves which model; waiting requests that now can start do."""
        self._serving = serving
        named = {worker for workers in serving.values() for worker in workers}
        for worker in named - self._targets.keys():
            self._targets[worker] = Target(worker, mine=len(self._at.get(worker, ())))
        for worker in self._targets.keys() - named:
            if not self._at.get(worker):
                del self._targets[worker]
        actions: list[Action] = []
        for flight in [f for f in self._waiting.values() if serving.get(f.job.model)]:
            actions += self._route(flight, now)
        return actions

    def report(self, worker: NodeId, load: Load) -> None:
        """A worker's load event."""
        target = self._targets.get(worker)
        if target is not None:
            target.report(load)

    # One request.

    def submit(self, job: Job, sink: Sink, now: float) -> tuple[int, list[Action]]:
        """Open a flight; raises Rejected if too many wait already."""
        if not self._serving.get(job.model) and len(self._waiting) >= MAX_WAITING:
            raise Rejected(Failure(429, "overloaded", "Too many requests are waiting for a worker; retry later.", 1))
        flight = Flight(self._next_rid, job, sink, now)
        self._next_rid += 1
        self.open[flight.rid] = flight
        return flight.rid, self._route(flight, now)

    def cancel(self, rid: int) -> list[Action]:
        """The client is gone, or a stop string was found: the sink hears nothing more."""
        flight = self.open.get(rid)
        return [] if flight is None else self._release(flight)

    def tokens(self, worker: NodeId, deltas: Sequence[Row], now: float) -> list[Action]:
        """One engine step's tokens. The hot path: one dict look-up and one sink call a delta."""
        mine = self._at.get(worker)
        if mine is None:
            return [Abandon(worker, rid, attempt) for rid, attempt, _, _, finish, _, _ in deltas if not finish]
        actions: list[Action] = []
        for rid, attempt, offset, tokens, finish, cached, logprobs in deltas:
            flight = mine.get(rid)
            if flight is None or attempt != flight.attempt:
                self.stale += 1
                if not finish:
                    actions.append(Abandon(worker, rid, attempt))
                continue
            if offset != flight.received:
                self.holes += 1
                actions += self._lost(flight, f"token frames from worker {worker} were lost", now)
                continue
            if tokens:
                flight.received = offset + len(tokens)
                flight.output.extend(tokens)
                flight.sink.on_tokens(
                    tokens, self._read_logprobs(logprobs) if logprobs else (), 0 if offset else cached
                )
            if finish:
                actions += self._finish(flight, finish, now)
        return actions

    def refused(self, worker: NodeId, rid: int, attempt: int, code: str, reason: str, now: float) -> list[Action]:
        """The worker will not run it: elsewhere if it may, else the client's fault or a full cluster."""
        flight = self._at.get(worker, {}).get(rid)
        if flight is None or flight.attempt != attempt:
            return []
        if code == "invalid":
            return self._fail(flight, Failure(400, "invalid_request", reason))
        if code == "overload" and flight.attempt >= MIGRATION_LIMIT:
            return self._fail(flight, Failure(429, "overloaded", reason, 1))
        return self._lost(flight, reason, now)

    # Workers and time.

    def worker_lost(self, worker: NodeId, reason: str, now: float) -> list[Action]:
        """Everything that it had goes elsewhere."""
        for workers in self._serving.values():
            if worker in workers:
                workers.remove(worker)
        actions: list[Action] = []
        for flight in list(self._at.get(worker, {}).values()):
            actions += self._lost(flight, reason, now, tell=False)
        self._targets.pop(worker, None)
        return actions

    def open_at(self, worker: NodeId) -> int:
        return len(self._at.get(worker, ()))

    def missing_at(self, worker: NodeId, known: Iterable[int], sent_before: float, now: float) -> list[Action]:
        """A heartbeat named the requests that the worker knows: those it has forgotten are lost there.

        ``sent_before`` spares requests that were dispatched so recently that the worker may not have seen them.
        """
        have = self._at.get(worker)
        if not have:
            return []
        gone = have.keys() - set(known)
        actions: list[Action] = []
        for flight in [have[rid] for rid in gone]:
            if flight.since <= sent_before:
                actions += self._lost(flight, f"worker {worker} no longer knows the request", now)
        return actions

    def tick(self, now: float) -> list[Action]:
        """Give up on requests that have waited too long."""
        actions: list[Action] = []
        for flight in [f for f in self._waiting.values() if f.since + WAIT_S <= now]:
            message = f"No ready worker for model {flight.job.model!r} could be reached; retry in a moment."
            actions += self._fail(flight, Failure(503, "no_ready_worker", message, 1))
        return actions

    def next_deadline(self) -> float | None:
        return min((flight.since + WAIT_S for flight in self._waiting.values()), default=None)

    # Inside.

    def _route(self, flight: Flight, now: float) -> list[Action]:
        serving = self._serving.get(flight.job.model) or ()
        pin = flight.job.pin
        ids = [w for w in serving if w == pin] if pin else serving
        if len(ids) > 1 and flight.workers:
            # Not straight back to the worker that just failed.
            ids = [w for w in ids if w != flight.workers[-1]] or ids
        if not ids:
            self._waiting[flight.rid] = flight
            return []
        self._waiting.pop(flight.rid, None)
        target = self._policy([self._targets[w] for w in ids])
        worker = target.worker
        target.mine += 1
        flight.worker = worker
        flight.since = now
        if not flight.workers or flight.workers[-1] != worker:
            flight.workers.append(worker)
        self._at.setdefault(worker, {})[flight.rid] = flight
        flight.sink.on_routed(worker)
        tokens = flight.job.tokens + flight.output if flight.output else flight.job.tokens
        return [Dispatch(worker, flight.rid, flight.attempt, flight.job, tokens)]

    def _leave(self, flight: Flight) -> None:
        worker = flight.worker
        if worker is None:
            return
        flight.worker = None
        at = self._at[worker]
        del at[flight.rid]
        if not at:
            del self._at[worker]
        target = self._targets.get(worker)
        if target is not None:
            target.mine -= 1

    def _release(self, flight: Flight, tell: bool = True) -> list[Action]:
        worker = flight.worker
        self._leave(flight)
        self._waiting.pop(flight.rid, None)
        del self.open[flight.rid]
        return [Abandon(worker, flight.rid, flight.attempt)] if tell and worker is not None else []

    def _finish(self, flight: Flight, finish: str, now: float) -> list[Action]:
        if finish in ("stop", "length"):
            self._release(flight, tell=False)
            flight.sink.on_end(Outcome(finish, tuple(flight.workers), flight.migrations))
            return []
        # The engine gave it up (error, abort that we did not ask for): as good as lost there.
        return self._lost(flight, f"worker {flight.worker} ended the request ({finish})", now, tell=False)

    def _fail(self, flight: Flight, failure: Failure, tell: bool = False) -> list[Action]:
        actions = self._release(flight, tell)
        flight.sink.on_end(Outcome("error", tuple(flight.workers), flight.migrations, failure))
        return actions

    def _lost(self, flight: Flight, reason: str, now: float, tell: bool = True) -> list[Action]:
        if flight.attempt >= MIGRATION_LIMIT or (flight.received and not flight.job.resumable):
            # The client has already seen a part that nobody can continue, or it has cost enough workers.
            return self._fail(
                flight, Failure(503, "worker_lost", f"The request could not be completed: {reason}.", 1), tell
            )
        actions: list[Action] = []
        if tell and flight.worker is not None:
            actions.append(Abandon(flight.worker, flight.rid, flight.attempt))
        self._leave(flight)
        flight.attempt += 1
        flight.migrations += 1
        self.migrations += 1
        flight.since = now
        return actions + self._route(flight, now)
