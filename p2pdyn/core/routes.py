"""Who may take a model's requests now, and who waits for them: what the router chooses from.

Requests go to aggregated and decode workers. Prefill workers only compute prompts for decode workers and hand their KV
blocks over; who does that for a request is asked (:meth:`Routes.prefill`) once its decode worker is chosen.

Targets come and go with workers and their links; a target that still has requests of ours is kept, so that what is
known of its load is not forgotten when it is back.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from p2pdyn.core import disagg
from p2pdyn.core.admission import Admission
from p2pdyn.core.kvhash import root_seed, sequence_hashes
from p2pdyn.core.request import Failure, Job
from p2pdyn.core.router import Ask, Decision, Prefill, Router
from p2pdyn.core.router_target import Target
from p2pdyn.core.types import AGGREGATED, DECODE, PREFILL, Load, NodeId, moves_alike, only_pulls
from p2pdyn.wire.kvpack import little

HASHING = ("kv", "kv-dynamo")
"""Policies that look at the prompt; the others are spared its hashes."""

Key = tuple[NodeId, int]
"""(worker, data-parallel rank)."""


class Endpoint(NamedTuple):
    """One routing target as its worker gossips it. ``kv_events``: its engine tells them; ``moves_kv`` as in
    :class:`~p2pdyn.core.types.ServedModel`."""

    worker: NodeId
    rank: int = 0
    kv_events: bool = False
    role: str = AGGREGATED
    moves_kv: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    """One model's workers, of all roles."""

    block_size: int
    targets: tuple[Endpoint, ...] = ()


@dataclass(slots=True)
class _Model:
    block_size: int
    targets: list[Target]
    """Those that generate."""
    prefills: list[Target]
    queue: Admission = field(default_factory=Admission)
    dependent: bool = False
    """Some of ``targets`` compute no prompts."""

    def place(self, targets: list[Target]) -> None:
        self.targets = [target for target in targets if target.role != PREFILL]
        self.prefills = [target for target in targets if target.role == PREFILL]
        self.dependent = any(target.role == DECODE and only_pulls(target.moves_kv) for target in targets)

    def able(self, target: Target) -> list[Target]:
        """The prefill workers that can hand prompts over to ``target``."""
        return [one for one in self.prefills if moves_alike(one.moves_kv, target.moves_kv)]

    def routable(self, taken: Collection[NodeId]) -> list[Target]:
        """Those of ``targets`` that are not ``taken`` and have somebody to compute prompts for them, if they cannot."""
        targets = self.targets
        if self.dependent:
            targets = [one for one in targets if one.role != DECODE or not only_pulls(one.moves_kv) or self.able(one)]
        return [target for target in targets if target.worker not in taken] if taken else targets


class Routes:
    """Pure; ``now`` in seconds never goes back."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.hand_overs = router.for_hand_overs()
        """The same for prefill workers."""
        self.crowded: set[str] = set()
        """Models with requests in their queue."""
        self.prompt_blocks = 0
        self.matched_blocks = 0
        """Of all prompts routed so far, and of these what the chosen target held or was to hold."""
        self._hashing = router.policy in HASHING
        self._models: dict[str, _Model] = {}
        self._targets: dict[Key, Target] = {}
        self._slots: dict[Key, int] = {}

    # Who there is.

    def update(self, serving: Mapping[str, Serving]) -> None:
        """Take over who may be routed to, by model; a model that is not named has nobody."""
        named: set[Key] = set()
        for name, one in serving.items():
            everyone = [self._target(endpoint) for endpoint in one.targets]
            named.update((target.worker, target.rank) for target in everyone)
            known = self._models.get(name)
            if known is None:
                known = self._models[name] = _Model(one.block_size, [], [])
            known.block_size = one.block_size
            known.place(everyone)
        for name in self._models.keys() - serving.keys():
            self._models[name].targets, self._models[name].prefills = [], []
            if not len(self._models[name].queue):
                del self._models[name]
        for key in [key for key, target in self._targets.items() if key not in named and not target.mine]:
            self._forget(key)

    def lost(self, worker: NodeId) -> None:
        """Nobody is sent there from now on."""
        for model in self._models.values():
            model.targets = [target for target in model.targets if target.worker != worker]
            model.prefills = [target for target in model.prefills if target.worker != worker]
        for key in [key for key in self._targets if key[0] == worker]:
            self._forget(key)

    def placed(self, key: Key, slot: int | None) -> None:
        """Where in the KV index a target's blocks are, None while they are nowhere."""
        if slot is None:
            self._slots.pop(key, None)
        else:
            self._slots[key] = slot
        target = self._targets.get(key)
        if target is not None:
            target.slot = -1 if slot is None else slot

    def report(self, worker: NodeId, rank: int, load: Load, now: float) -> None:
        """A worker's load event."""
        target = self._targets.get((worker, rank))
        if target is not None:
            target.report(load, now)

    def serves(self, model: str) -> bool:
        """Whether anybody may be routed to; prefill workers alone may not."""
        known = self._models.get(model)
        return known is not None and bool(known.targets)

    def targets(self) -> list[Target]:
        """All of them, for checks."""
        return list(self._targets.values())

    # Decisions.

    def choose(
        self, job: Job, tokens: array[int], failed: NodeId | None, now: float, taken: Collection[NodeId] = ()
    ) -> Decision | None:
        """Where ``tokens`` (the prompt and what has been generated) should go, but not to ``failed`` if there is
        another, and never to workers that are ``taken``; None: nobody may take it."""
        found = self._ask(job, tokens, failed, taken)
        if found is None:
            return None
        decision = self.router.choose(*found, now)
        if decision is not None:
            self.prompt_blocks += decision.view.blocks
            self.matched_blocks += decision.matched
        return decision

    def explain(self, job: Job, now: float) -> Decision | None:
        """What :meth:`choose` would answer for the prompt now, leaving no trace."""
        found = self._ask(job, job.tokens, None)
        decision = None if found is None else self.router.explain(*found, now)
        if decision is not None and decision.target.role == DECODE:
            self._prefill(job, decision, None, now)
        return decision

    def prefill(self, job: Job, decision: Decision, failed: NodeId | None, now: float) -> Decision | None:
        """Who computes the prompt of ``decision``, which is for a decode worker, and hands it over, never ``failed``
        unless nobody else can; None: the decode worker does better itself. ``decision.prefill`` says why."""
        found = self._prefill(job, decision, failed, now)
        if found is not None:
            self.hand_overs.settle(found, now)
        return found

    def again(
        self, job: Job, tokens: array[int], decision: Decision, failed: NodeId | None, now: float
    ) -> Decision | None:
        """``decision``, made a while ago, while its target is there and has room, else another one."""
        if self.current(decision.target) and (job.pin or not self.router.saturated((decision.target,), now)):
            return decision
        return self.choose(job, tokens, failed, now)

    def current(self, target: Target) -> bool:
        """Whether ``target`` is still one: its worker has not been lost since."""
        return self._targets.get((target.worker, target.rank)) is target

    def _prefill(self, job: Job, decision: Decision, failed: NodeId | None, now: float) -> Decision | None:
        target, ask, size = decision.target, decision.ask, decision.ask.block_size
        found: Decision | None = None
        must = only_pulls(target.moves_kv)
        if must or (decision.uncached > size and target.moves_kv):
            able = self._models[job.model].able(target)
            others = [one for one in able if one.worker != failed]
            if must and not others:
                others = able
            found = self.hand_overs.explain(Ask(ask.tokens, ask.hashes, size), others, now)
        pull = decision.pull
        local = disagg.Side(
            decision.uncached,
            target.queue_s(now),
            target.load.prefill_tps,
            max(0, target.requests - target.load.queued),
            pull.pull_s if pull is not None else 0.0,
        )
        if found is None:
            decision.prefill = Prefill(None, disagg.judge(local, None, size, 0.0))
            return None
        there = found.target
        remote = disagg.Side(found.uncached, there.queue_s(now), there.load.prefill_tps)
        lacking = ask.tokens - decision.matched * size
        moving_s = disagg.pull_s(lacking, size, there.load.block_bytes, target.load.pull_bps)
        full = self.hand_overs.saturated((there,), now)
        verdict = disagg.judge(local, remote, size, moving_s, full)
        if must:
            verdict = verdict._replace(remote=True, why=disagg.REMOTE)
        decision.prefill = Prefill(there, verdict)
        return found if verdict.remote else None

    def _ask(
        self, job: Job, tokens: array[int], failed: NodeId | None, taken: Collection[NodeId] = ()
    ) -> tuple[Ask, list[Target]] | None:
        model = self._models.get(job.model)
        if model is None:
            return None
        targets = model.routable(taken)
        if not targets:
            return None
        exclude: tuple[NodeId, ...] = ()
        if failed is not None and not job.pin and any(target.worker != failed for target in targets):
            exclude = (failed,)
        hashes: list[int] = []
        if self._hashing:
            params = job.params
            hashes = sequence_hashes(
                little(tokens).tobytes(), model.block_size, root_seed(params.lora, params.cache_salt)
            )
        return Ask(len(tokens), hashes, model.block_size, job.pin, job.session, exclude), targets

    # The queue before targets that have enough to do.

    def must_wait(self, model: str, now: float) -> bool:
        """All targets have enough to begin with, or others wait already."""
        known = self._models.get(model)
        return known is not None and bool(known.targets) and (len(known.queue) > 0 or self._busy(known, now))

    def wait(self, rid: int, job: Job, now: float) -> None:
        """Put a request into its model's queue. Raises Rejected (429) if it is full."""
        model, params, tokens = self._models[job.model], job.params, len(job.tokens)
        cost = tokens + min(params.max_tokens, self.router.expected_output)
        clear_s = self.router.clear_s(model.targets, now)
        model.queue.wait(rid, now, params.priority, job.client, tokens, cost, clear_s)
        self.crowded.add(job.model)

    def retry_after(self, model: str, now: float) -> int:
        """Whole seconds until those that wait for room now will have been served."""
        known = self._models.get(model)
        return known.queue.retry_after(now, self.router.clear_s(known.targets, now)) if known is not None else 1

    def leave(self, rid: int, job: Job) -> None:
        """The request waits no more, if it did."""
        model = self._models.get(job.model)
        if model is not None and model.queue.cancel(rid) and not len(model.queue):
            self.crowded.discard(job.model)

    def next(self, model: str, now: float) -> int | None:
        """Whose turn it is; None if nobody waits or there is no room. With no target left, all may leave the queue."""
        known = self._models[model]
        rid = None
        if not known.targets or not self._busy(known, now):
            rid = known.queue.next(now)
        if not len(known.queue):
            self.crowded.discard(model)
        assert rid is None or isinstance(rid, int)
        return rid

    def overdue(self, now: float) -> list[tuple[int, Failure]]:
        """Those that have waited too long, and what to tell them."""
        late = [one for name in list(self.crowded) for one in self._models[name].queue.overdue(now)]
        self.crowded = {name for name in self.crowded if len(self._models[name].queue)}
        return [(rid, failure) for rid, failure in late if isinstance(rid, int)]

    def queued(self) -> dict[str, int]:
        """How many wait, by model."""
        return {name: len(model.queue) for name, model in self._models.items()}

    # Inside.

    def _busy(self, model: _Model, now: float) -> bool:
        return self.router.busy(model.targets, now)

    def _target(self, one: Endpoint) -> Target:
        key = (one.worker, one.rank)
        target = self._targets.get(key)
        if target is None:
            target = self._targets[key] = Target(*key, self._slots.get(key, -1))
        target.approximate = self._hashing and not one.kv_events
        target.role, target.moves_kv = one.role, one.moves_kv
        return target

    def _forget(self, key: Key) -> None:
        target = self._targets.pop(key)
        self.router.predictions.forget(target)
        self.hand_overs.predictions.forget(target)
