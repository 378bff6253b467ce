"""Every open request of one frontend: who works on it, what has arrived, what happens when a worker is lost.

States of a flight and the way out of each (one release for all of them, :meth:`Flights._release`):

    waiting   no routable worker yet      -> running, failed (deadline), cancelled
    queued    all workers are saturated   -> running, waiting, failed (deadline), cancelled
    held      may kill its worker, to be tried alone (core/trials.py) -> running, waiting, failed (deadline), cancelled
    prefill   a prefill worker computes   -> running, cancelled, failed; lost there: as running when its worker is lost
    running   a worker has it             -> done, failed, cancelled, running on another worker (migration), waiting

A token frame carries (attempt, offset of its first token).  An older attempt is dropped; a hole in the offsets counts
as loss of the worker for that request, because ZeroMQ drops frames at the high-water mark without telling.

Migration sends the prompt and all tokens received so far to another worker: exact for greedy, seeded and stopped
requests, since engines count tokens from ``prompt_len``.  What cannot be continued exactly (``Job.resumable`` False) is
rerun while the client has seen nothing, and fails with ``worker_lost`` after that.

Where a prefill worker computes the prompt (docs/design/kv-transfer.md), each of the two legs is an attempt of its own.
Until the first token of the decode leg the prefill worker may hold blocks for it: a decode worker that takes over gets
the same :class:`Transfer`, and if there is none, or the client goes, the prefill worker is told.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from p2pdyn.core.flight_parts import Abandon, Action, Dispatch, Flight, Lent, Transfer
from p2pdyn.core.request import Failure, Job, Logprobs, Outcome, Rejected, Sink
from p2pdyn.core.router import Decision
from p2pdyn.core.router_cost import Pull
from p2pdyn.core.router_target import Target
from p2pdyn.core.routes import Routes, Serving
from p2pdyn.core.trials import Trials
from p2pdyn.core.types import DECODE, Load, NodeId, moves_alike, only_pulls
from p2pdyn.wire.requests import Prefilled, Row

MIGRATION_LIMIT = 16
"""Losses of its worker, of whatever kind, after which it is tried again. Deaths of workers that it causes end it much
sooner (:data:`p2pdyn.core.blame.DEATH_LIMIT`)."""

MOVE_LIMIT = 32
"""Moves away from draining workers that cost a request nothing: a rolling restart moves it at most once a worker.
Beyond that each is a failure, so that attempts, a u8, are bounded."""

REFUSED_LIMIT = 3
"""Workers with no room for it that are asked before the client is told to come back."""

WAIT_S = 5.0
"""Seconds a request waits for a routable worker (links are opened at the first request for a model)."""

MAX_WAITING = 1024
"""Requests waiting for a worker; one more is answered 429."""


class Flights:
    """Pure; the sinks that it calls belong to the caller. ``on_decision(rid, decision)`` sees each routing decision
    before anything else happens."""

    def __init__(
        self,
        routes: Routes,
        read_logprobs: Callable[[bytes], Logprobs],
        on_decision: Callable[[int, Decision], None] | None = None,
    ) -> None:
        self.routes = routes
        self._read_logprobs = read_logprobs
        self._on_decision = on_decision
        self._next_rid = 1
        self.open: dict[int, Flight] = {}
        self._waiting: dict[int, Flight] = {}
        self._at: dict[NodeId, dict[int, Flight]] = {}
        self.trials = Trials()
        self.migrations = 0
        self.holes = 0
        self.stale = 0
        self.prefills_remote = self.prefills_local = 0
        """Prompts for decode workers that a prefill worker was asked to compute, and that they were to compute."""
        self.prefill_fallbacks = 0
        """Of the former, those that came to nothing."""
        self.pulls = 0
        """Prefixes to be taken from another worker instead of computed."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        """Of all prompts whose first token has come, and of these what was in the worker's prefix cache."""

    # Who may be routed to.

    def routable(self, serving: Mapping[str, Serving], now: float) -> list[Action]:
        """Take over who serves which model; waiting requests that now can start do."""
        self.routes.update(serving)
        self.trials.room = True
        actions: list[Action] = []
        for flight in [f for f in self._waiting.values() if self.routes.serves(f.job.model)]:
            actions += self._route(flight, now)
        return actions + self._admit(now)

    def report(self, worker: NodeId, rank: int, load: Load, now: float) -> list[Action]:
        """A worker's load event: there may be room again."""
        self.routes.report(worker, rank, load, now)
        return self._admit(now)

    # One request.

    def submit(self, job: Job, sink: Sink, now: float) -> tuple[int, list[Action]]:
        """Open a flight; raises Rejected if too many wait already."""
        if not self.routes.serves(job.model) and len(self._waiting) >= MAX_WAITING:
            message = f"{MAX_WAITING} requests wait for a worker to be there; retry in {WAIT_S:.0f} s."
            raise Rejected(Failure(429, "overloaded", message, int(WAIT_S)))
        flight = Flight(self._next_rid, job, sink, now)
        self._next_rid += 1
        if not job.pin and self.routes.must_wait(job.model, now):
            self.routes.wait(flight.rid, job, now)
            self.open[flight.rid] = flight
            return flight.rid, self._admit(now)
        self.open[flight.rid] = flight
        return flight.rid, self._route(flight, now)

    def cancel(self, rid: int, now: float) -> list[Action]:
        """The client is gone, or a stop string was found: the sink hears nothing more."""
        flight = self.open.get(rid)
        return [] if flight is None else self._release(flight, now) + self._admit(now)

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
                if flight.prefilling:
                    if flight.prefill is not None:
                        actions += self._lost(flight, f"worker {worker} generated instead of handing over", now)
                        continue
                    cached = self._first_token(flight, cached, now)
                elif flight.trial and now >= flight.trial:
                    self.trials.passed(flight)
                flight.received = offset + len(tokens)
                flight.output.extend(tokens)
                flight.sink.on_tokens(
                    tokens, self._read_logprobs(logprobs) if logprobs else (), 0 if offset else cached
                )
            if finish:
                actions += self._finish(flight, finish, now)
        if self.routes.crowded or self.trials.room:
            actions += self._admit(now)
        return actions

    def refused(self, worker: NodeId, rid: int, attempt: int, code: str, reason: str, now: float) -> list[Action]:
        """The worker will not run it: elsewhere if it may, else the client's fault or a full cluster."""
        flight = self._at.get(worker, {}).get(rid)
        if flight is None or flight.attempt != attempt:
            return []
        if code == "invalid" and flight.prefill is None:
            return self._fail(flight, Failure(400, "invalid_request", reason), now)
        if code == "overload" and flight.failures >= REFUSED_LIMIT:
            retry = self.routes.retry_after(flight.job.model, now)
            return self._fail(flight, Failure(429, "overloaded", reason, retry), now)
        return self._lost(flight, reason, now, planned=code == "draining")

    def move(self, worker: NodeId, requests: Iterable[tuple[int, int]], now: float) -> list[Action]:
        """A draining worker, which is routed to no more, asks for these to go on elsewhere; what nobody else can
        continue now stays where it is."""
        mine = self._at.get(worker, {})
        actions: list[Action] = []
        for rid, attempt in requests:
            flight = mine.get(rid)
            if flight is None or flight.attempt != attempt:
                actions.append(Abandon(worker, rid, attempt))
            elif flight.resumable and not flight.job.pin and self.routes.serves(flight.job.model):
                actions += self._lost(flight, f"worker {worker} drained", now, planned=True)
        return actions

    def end(self, failure: Failure, now: float) -> list[Action]:
        """This frontend has to go: whatever is open ends with ``failure``."""
        return [action for flight in list(self.open.values()) for action in self._fail(flight, failure, now, tell=True)]

    def prefilled(self, worker: NodeId, message: Prefilled, now: float) -> list[Action]:
        """A prefill worker has computed the prompt: on to the decode worker."""
        flight = self._at.get(worker, {}).get(message.rid)
        if flight is None or flight.attempt != message.attempt or flight.prefill is None or flight.decode is None:
            self.stale += 1
            lent = known.lent if (known := self.open.get(message.rid)) is not None else None
            if lent is not None and (lent.transfer.source, lent.attempt) == (worker, message.attempt):
                return []  # told twice
            return [Abandon(worker, message.rid, message.attempt)]
        first, source = flight.decode, flight.prefill.target
        self.routes.hand_overs.first_token(flight.rid, now)
        self._leave(flight, now, computed=True)
        if message.lease or message.remote:
            transfer = Transfer(worker, message.epoch, message.lease, message.blocks, message.remote)
            flight.lent = Lent(transfer, flight.attempt, source, message.cached)
        else:
            self.prefill_fallbacks += 1
        flight.attempt += 1
        flight.since = now
        tokens = flight.tokens
        decision = self.routes.again(flight.job, tokens, first, flight.failed, now)
        if decision is None:
            self._waiting[flight.rid] = flight
            return self._give_up(flight)
        actions = self._start(flight, tokens, decision, now)
        return actions + self._admit(now) if self.routes.crowded else actions

    # Workers and time.

    def worker_lost(self, worker: NodeId, reason: str, now: float, died: bool = False) -> list[Action]:
        """Everything that it had goes elsewhere. ``died``: its process or its engine has, for all we know, which one
        of them may have done; :meth:`worker_lives` takes that back."""
        self.routes.lost(worker)
        flights = list(self._at.get(worker, {}).values())
        if died and flights:
            self.trials.died(worker, [flight.rid for flight in flights], reason)
        actions: list[Action] = []
        for flight in flights:
            actions += self._lost(flight, reason, now, tell=False)
        for flight in [f for f in self.open.values() if f.lent and f.lent.once and f.lent.transfer.source == worker]:
            actions += self._lost(flight, f"prefill worker {worker} was lost", now)
        return actions + self._admit(now)

    def worker_lives(self, worker: NodeId, now: float) -> list[Action]:
        """It is the same as before: it was cut off and has not died."""
        self.trials.lives(worker)
        return self._admit(now)

    def runs(self, worker: NodeId, rid: int, attempt: int) -> bool:
        """Whether this attempt is at this worker."""
        flight = self._at.get(worker, {}).get(rid)
        return flight is not None and flight.attempt == attempt

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
            actions += self._fail(flight, Failure(503, "no_ready_worker", message, 1), now)
        for rid, failure in self.trials.guilty(now):
            actions += self._fail(self.open[rid], failure, now)
        for flight, failure in self.trials.overdue(now):
            actions += self._fail(flight, failure, now)
        for rid, failure in self.routes.overdue(now):
            actions += self._fail(self.open[rid], failure, now)
        return actions + self._admit(now)

    def next_deadline(self) -> float | None:
        return min((flight.since + WAIT_S for flight in self._waiting.values()), default=None)

    # Inside.

    def _route(self, flight: Flight, now: float) -> list[Action]:
        trials = self.trials
        if trials.accused(flight.rid):
            trials.held[flight.rid] = flight
            return self._give_up(flight)
        tokens = flight.tokens
        suspect = trials.suspect(flight.rid)
        # Not straight back to the worker that just failed.
        decision = self.routes.choose(flight.job, tokens, flight.failed, now, trials.taken if suspect else ())
        self._waiting.pop(flight.rid, None)
        if decision is None:
            idle = trials.held if suspect and self.routes.serves(flight.job.model) else self._waiting
            idle[flight.rid] = flight
            return self._give_up(flight)
        prefill = None
        must = decision.target.role == DECODE and only_pulls(decision.target.moves_kv)
        if suspect and not must:
            trials.begin(flight, decision.target.worker)
        elif decision.target.role == DECODE and flight.lent is None:
            prefill = self.routes.prefill(flight.job, decision, flight.failed_prefill, now)
            if must and prefill is None:
                self._waiting[flight.rid] = flight
                return self._give_up(flight)
            self.prefills_local += prefill is None
        if self._on_decision is not None:
            self._on_decision(flight.rid, decision)
        if prefill is None:
            return self._start(flight, tokens, decision, now)
        self.prefills_remote += 1
        flight.decode, flight.prefill = decision, prefill
        decision.target.promise(flight.rid, decision.view.blocks)
        self.routes.hand_overs.sent(flight.rid, prefill, now)
        transfer = self._prefix(prefill.pull) if prefill.pull is not None else None
        return [self._dispatch(flight, tokens, prefill, now, hand_over=True, transfer=transfer)]

    def _start(self, flight: Flight, tokens: array[int], decision: Decision, now: float) -> list[Action]:
        """Have the chosen worker generate."""
        actions: list[Action] = []
        transfer: Transfer | None = None
        if flight.lent is not None:
            if self._usable(flight.lent, decision.target):
                transfer = flight.lent.transfer
                left = len(tokens) - transfer.blocks * decision.ask.block_size if transfer.blocks else 1
                decision = replace(decision, uncached=max(1, min(decision.uncached, left)))
            else:
                actions = self._give_up(flight)
        if transfer is None and decision.pull is not None:
            transfer = self._prefix(decision.pull)
        self.routes.router.sent(flight.rid, decision, now)
        worker = decision.target.worker
        if not flight.workers or flight.workers[-1] != worker:
            flight.workers.append(worker)
        dispatch = self._dispatch(flight, tokens, decision, now, transfer=transfer)
        flight.sink.on_routed(worker)
        return [*actions, dispatch] if actions else [dispatch]

    def _usable(self, lent: Lent, target: Target) -> bool:
        return moves_alike(lent.source.moves_kv, target.moves_kv) and self.routes.current(lent.source)

    def _prefix(self, pull: Pull) -> Transfer:
        self.pulls += 1
        return Transfer(pull.source.worker, 0, 0, pull.blocks)

    def _dispatch(
        self,
        flight: Flight,
        tokens: array[int],
        decision: Decision,
        now: float,
        hand_over: bool = False,
        transfer: Transfer | None = None,
    ) -> Dispatch:
        target = decision.target
        flight.worker = target.worker
        flight.since = now
        flight.prefilling = True
        self._at.setdefault(target.worker, {})[flight.rid] = flight
        return Dispatch(
            target.worker, flight.rid, flight.attempt, flight.job, tokens, target.rank, decision.uncached, hand_over,
            transfer,
        )  # fmt: skip

    def _give_up(self, flight: Flight) -> list[Action]:
        """Nobody will take what a prefill worker holds for it."""
        lent, flight.lent = flight.lent, None
        return [] if lent is None else [Abandon(lent.transfer.source, flight.rid, lent.attempt)]

    def _admit(self, now: float) -> list[Action]:
        """Those whose turn it is leave the queue of saturated models, and suspects that can be tried are."""
        actions: list[Action] = []
        for flight in self.trials.take():
            if not self.trials.accused(flight.rid) and not self.routes.serves(flight.job.model):
                flight.since = now  # for WAIT_S
            actions += self._route(flight, now)
        for model in list(self.routes.crowded):
            while (rid := self.routes.next(model, now)) is not None:
                actions += self._route(self.open[rid], now)
        return actions

    def _first_token(self, flight: Flight, cached: int, now: float) -> int:
        """How much of the prompt was cached: what has been handed over was not, for its being so."""
        flight.prefilling = False
        if flight.trial:
            flight.trial += now
        if flight.lent is not None:
            cached, flight.lent = cached if flight.lent.once else flight.lent.cached, None
        self.routes.router.first_token(flight.rid, now)
        self.prompt_tokens += len(flight.job.tokens)
        self.cached_tokens += cached
        return cached

    def _leave(self, flight: Flight, now: float, computed: bool = False) -> None:
        """``computed``: the prompt, by a prefill worker."""
        worker = flight.worker
        if worker is None:
            return
        flight.worker = None
        if flight.trial:
            self.trials.left(flight)
        if flight.prefill is None:
            self.routes.router.finished(flight.rid, now, 0 if flight.prefilling else flight.received)
        else:
            self.routes.hand_overs.finished(flight.rid, now, int(computed))
            if flight.decode is not None:
                flight.decode.target.withdraw(flight.rid)
            flight.prefill = flight.decode = None
        at = self._at[worker]
        del at[flight.rid]
        if not at:
            del self._at[worker]

    def _release(self, flight: Flight, now: float, tell: bool = True) -> list[Action]:
        worker = flight.worker
        if worker is None:
            self.routes.leave(flight.rid, flight.job)
            self._waiting.pop(flight.rid, None)
        self._leave(flight, now)
        self.trials.forget(flight.rid)
        del self.open[flight.rid]
        actions: list[Action] = [Abandon(worker, flight.rid, flight.attempt)] if tell and worker is not None else []
        return actions if flight.lent is None else actions + self._give_up(flight)

    def _finish(self, flight: Flight, finish: str, now: float) -> list[Action]:
        if finish in ("stop", "length") and flight.prefill is None:
            actions = self._release(flight, now, tell=False)
            flight.sink.on_end(Outcome(finish, tuple(flight.workers), flight.migrations))
            return actions
        # The engine gave it up (error, abort that we did not ask for): as good as lost there.
        return self._lost(flight, f"worker {flight.worker} ended the request ({finish})", now, tell=False)

    def _fail(self, flight: Flight, failure: Failure, now: float, tell: bool = False) -> list[Action]:
        actions = self._release(flight, now, tell)
        flight.sink.on_end(Outcome("error", tuple(flight.workers), flight.migrations, failure))
        return actions

    def _lost(self, flight: Flight, reason: str, now: float, tell: bool = True, planned: bool = False) -> list[Action]:
        """``planned``: its worker drains, which is no failure of the request."""
        prefill = flight.prefill is not None
        if prefill:
            self.prefill_fallbacks += 1
            flight.failed_prefill = flight.worker
        else:
            flight.failed = flight.worker
        planned = planned and flight.moves < MOVE_LIMIT
        if not flight.resumable or (flight.failures >= MIGRATION_LIMIT and not planned):
            # The client has already seen a part that nobody can continue, or it has cost enough workers.
            failure = Failure(503, "worker_lost", f"The request could not be completed: {reason}.", 1)
            return self._fail(flight, failure, now, tell)
        actions: list[Action] = []
        if tell and flight.worker is not None:
            actions.append(Abandon(flight.worker, flight.rid, flight.attempt))
        if flight.lent is not None and flight.lent.once:
            actions += self._give_up(flight)
        self._leave(flight, now)
        flight.attempt += 1
        flight.moves += planned
        flight.failures += not planned
        if not prefill:
            flight.migrations += 1
            self.migrations += 1
        flight.since = now
        return actions + self._route(flight, now)
