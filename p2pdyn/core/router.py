"""Which target takes a prompt.

One decision is one :class:`~p2pdyn.core.router_cost.View` (what is cached where, what is queued where), a policy's cost
for each target, and the lowest cost among the targets that may be chosen, ties at random.  What overrides the cost:

1. A pin (``x-p2pdyn-pin``): only that worker's ranks may be chosen, saturated or not.
2. Workers that just failed the request are left out; saturated ones are while any other is left.
3. A session (``x-p2pdyn-session``): the target that rendezvous hashing names among those that may be chosen, unless it
   costs :data:`SESSION_MARGIN_S` more than the best (policies that do not count in seconds: whatever it costs).  No
   state is kept, so every frontend names the same one, and a death moves only the dead worker's sessions.

:meth:`Router.explain` is the same code with the same draws: it tells what :meth:`Router.choose` would do now.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from math import inf
from statistics import median
from typing import NamedTuple, Protocol

from xxhash import xxh3_64_intdigest

from p2pdyn.core.admission import DEFAULT_LIMITS, Limits, doubtful, saturation, supplied
from p2pdyn.core.disagg import Verdict
from p2pdyn.core.router_cost import DISK_CREDIT, HOST_CREDIT, POLICIES, Pull, View, pull_to
from p2pdyn.core.router_predict import Predictions
from p2pdyn.core.router_shared import Shared
from p2pdyn.core.router_target import DEFAULT_TPS, Target
from p2pdyn.core.types import NodeId

SESSION_MARGIN_S = 2.0
"""What staying together is worth; more waiting than this is worse than a second copy of the session's prefix."""

ASSUME_S = 1.0
"""How often speeds are looked at for their age."""

FIRST_OUTPUT = 256.0
"""Expected output tokens before any answer has ended."""
KEEP_OUTPUT = 0.98
"""Weight of the past at each answer: about the last fifty."""


class Held(Protocol):
    """What :class:`p2pdyn.core.kvindex.Match` has: slot -> leading blocks held in any tier, and how many of these are
    in no faster tier than host or disk."""

    blocks: dict[int, int]
    host: dict[int, int]
    disk: dict[int, int]


class Index(Protocol):
    """What :class:`p2pdyn.core.kvindex.KvIndex` does for the router; ``candidates`` is a bit set of slots."""

    def match(self, hashes: list[int], candidates: int, /) -> Held: ...


# Made for each request and changed by nobody; not frozen, which would make them three times as dear to make.


@dataclass(slots=True)
class Ask:
    """A prompt of ``tokens`` token ids; ``hashes`` are the sequence hashes of its full blocks, empty if not known."""

    tokens: int
    hashes: list[int] = field(default_factory=list)
    block_size: int = 16
    pin: str = ""
    session: str = ""
    exclude: Collection[NodeId] = ()


@dataclass(slots=True)
class Decision:
    """``cost`` is in the policy's unit; ``matched`` counts blocks that the target holds or is predicted to hold,
    ``uncached`` prompt tokens that it has to compute."""

    target: Target
    matched: int
    uncached: int
    cost: float
    ask: Ask
    view: View
    costs: list[float]
    why: str
    """cost, session, pin"""
    pull: Pull | None = None
    """Blocks that it takes from another target first; ``uncached`` and ``cost`` count on them."""
    prefill: Prefill | None = None
    """Of a decode worker, once it has been asked whether a prefill worker computes the prompt."""


class Prefill(NamedTuple):
    """``target`` is the best prefill worker's, None if none was asked."""

    target: Target | None
    verdict: Verdict


class Router:
    """``policy`` is a key of :data:`~p2pdyn.core.router_cost.POLICIES` (KeyError); with ``limits`` None no target
    is ever saturated. All randomness of the next decision is drawn beforehand, which is why it can be told."""

    def __init__(
        self,
        policy: str,
        rng: random.Random,
        index: Index | None = None,
        limits: Limits | None = DEFAULT_LIMITS,
        predictions: Predictions | None = None,
    ) -> None:
        self.policy = policy
        self.predictions = Predictions() if predictions is None else predictions
        self._shared = Shared()
        self._score = POLICIES[policy]
        self._margin = SESSION_MARGIN_S if policy == "kv" else inf
        self._rng = rng
        self._index = index
        self.limits = limits
        self._turn = rng.randrange(1 << 16)
        self._draws = (rng.random(), rng.random())
        self._output = FIRST_OUTPUT
        self._at: dict[Hashable, Target] = {}
        self._slots: list[int] = []
        self._assume_at = 0.0
        self._mask = 0
        """Of the targets asked about last, and the same as a bit set."""

    def for_hand_overs(self) -> Router:
        """Another one over the same index, for workers that only compute prompts: by `kv` whatever the policy here,
        and no answer is expected of them."""
        other = Router("kv", random.Random(self._rng.random()), self._index, self.limits)
        other._output = 1.0
        return other

    # One decision.

    def choose(self, ask: Ask, targets: Sequence[Target], now: float) -> Decision | None:
        """Where ``ask`` should go; None if nobody may take it. :meth:`sent` tells that it went there."""
        decision = self._decide(ask, targets, now)
        self.settle(decision, now)
        return decision

    def settle(self, decision: Decision | None, now: float) -> None:
        """What :meth:`explain` answered is the choice: the next one is another turn."""
        self._turn += 1
        self._draws = (self._rng.random(), self._rng.random())
        if decision is not None and decision.view.known:
            self._shared.left(decision.ask.hashes[decision.view.known - 1], now)

    def explain(self, ask: Ask, targets: Sequence[Target], now: float) -> Decision | None:
        """What :meth:`choose` would answer now, without its being the next turn."""
        return self._decide(ask, targets, now)

    def saturated(self, targets: Sequence[Target], now: float) -> bool:
        """Whether none of ``targets`` should get more now."""
        limits = self.limits
        return limits is not None and all(saturation(target, target.queue_s(now), limits) for target in targets)

    def busy(self, targets: Sequence[Target], now: float) -> bool:
        """Whether all of ``targets`` are saturated, or have enough to begin with until they hear of more."""
        limits = self.limits
        if limits is None:
            return False
        for target in targets:
            queue_s = target.queue_s(now)
            if not supplied(target, queue_s, target.late_s(now)) and not saturation(target, queue_s, limits):
                return False
        return True

    @property
    def expected_output(self) -> float:
        """Tokens of an answer: a running mean."""
        return self._output

    def clear_s(self, targets: Sequence[Target], now: float) -> float:
        """Seconds until the first of saturated ``targets`` has worked its prefill queue down to the limit."""
        limit = self.limits.prefill_s if self.limits is not None else inf
        return max(0.0, min((target.queue_s(now) - limit for target in targets), default=0.0))

    def _decide(self, ask: Ask, targets: Sequence[Target], now: float) -> Decision | None:
        self._assume(targets, now)
        output = self._output
        queues = [target.wait_s(now, output) if target.waits else 0.0 for target in targets]
        allowed = self._allowed(ask, targets, queues)
        if not allowed:
            return None
        have, matched, credit = self._held(ask, targets, now)
        blocks = -(-ask.tokens // ask.block_size)
        known = max(matched)
        shared = self._shared.count(ask.hashes[known - 1]) if known else 0
        view = View(
            ask.tokens, blocks, ask.block_size, targets, allowed, ask.exclude, queues, have, matched, known, credit,
            shared, now, output, self._turn, self._draws,
        )  # fmt: skip
        costs = self._score(view)
        best = min(costs if len(allowed) == len(costs) else [costs[position] for position in allowed])
        ties = [position for position in allowed if costs[position] == best]
        chosen, why = ties[int(self._draws[0] * len(ties))], "pin" if ask.pin else "cost"
        if ask.session and not ask.pin:
            home = _rendezvous(ask.session, targets, allowed)
            if costs[home] <= best + self._margin:
                chosen, why = home, "session"
        target, had = targets[chosen], matched[chosen]
        uncached = max(1, ask.tokens - int(credit[chosen] * ask.block_size))
        decision = Decision(target, had, uncached, costs[chosen], ask, view, costs, why)
        if target.block_pull_s and self.policy == "kv" and (pull := pull_to(view, chosen)) is not None:
            decision.pull = pull
            decision.uncached = max(1, uncached - (pull.blocks - had) * ask.block_size)
        return decision

    def _allowed(self, ask: Ask, targets: Sequence[Target], queues: list[float]) -> Sequence[int]:
        allowed: Sequence[int] = range(len(targets))
        if ask.pin:
            allowed = [position for position in allowed if targets[position].worker == ask.pin]
        if ask.exclude:
            allowed = [position for position in allowed if targets[position].worker not in ask.exclude]
        limits = self.limits
        if limits is None or ask.pin or not doubtful(targets, queues, limits):
            return allowed
        free = [position for position in allowed if not saturation(targets[position], queues[position], limits)]
        return free or allowed

    def _held(self, ask: Ask, targets: Sequence[Target], now: float) -> tuple[list[int], list[int], Sequence[float]]:
        """Leading blocks of the prompt at each target: those held, those and the ones predicted, and the same with
        slower tiers at their credit."""
        matched = [0] * len(targets)
        if not ask.hashes:
            return matched, matched, [0.0] * len(targets)
        held: Held | None = None
        if self._index is not None:
            slots = [target.slot for target in targets]
            if slots != self._slots:
                self._slots, self._mask = slots, sum({1 << slot for slot in slots if slot >= 0})
            held = self._index.match(ask.hashes, self._mask)
            matched = list(map(held.blocks.get, slots, repeat(0)))
        credit: list[float] = [*matched]
        if held is not None and (held.host or held.disk):
            for position, target in enumerate(targets):
                credit[position] -= (1 - HOST_CREDIT) * held.host.get(target.slot, 0)
                credit[position] -= (1 - DISK_CREDIT) * held.disk.get(target.slot, 0)
        have = matched
        predicted = self.predictions.match(ask.hashes, now)
        if predicted:
            matched = [*have]
        for target, blocks in predicted.items():  # few
            if target in targets:
                position = targets.index(target)
                more = blocks - matched[position]
                if more > 0:
                    matched[position] += more
                    credit[position] += more
        return have, matched, credit

    def _assume(self, targets: Sequence[Target], now: float) -> None:
        """Give those whose speed is not known, or is old news, the median of the others', or part of it."""
        speeds = [target.load.prefill_tps for target in targets]
        if 0.0 in speeds or now >= self._assume_at:
            self._assume_at = now + ASSUME_S
            known = [speed for speed in speeds if speed]
            assumed = median(known) if known else DEFAULT_TPS
            for target in targets:
                target.assume(assumed, now)

    # What became of it.

    def sent(self, key: Hashable, decision: Decision, now: float) -> None:
        """The prompt has gone to the decision's target as ``key`` (a request's attempt)."""
        target, ask = decision.target, decision.ask
        self._at[key] = target
        target.sent(key, decision.uncached, decision.view.blocks, now)
        if ask.hashes:
            self.predictions.add(key, target, ask.hashes, decision.matched, now)

    def first_token(self, key: Hashable, now: float) -> None:
        """Its prompt has been computed."""
        target = self._at.get(key)
        if target is not None:
            target.first_token(key)
            self.predictions.settled(key, now)

    def finished(self, key: Hashable, now: float, output: int = 0) -> None:
        """It has ended there, in whatever way, after ``output`` tokens; unknown keys are ignored."""
        target = self._at.pop(key, None)
        if target is None:
            return
        target.finished(key, now)
        if output:
            self._output = KEEP_OUTPUT * self._output + (1 - KEEP_OUTPUT) * output
            self.predictions.settled(key, now)
        else:
            self.predictions.failed(key)


def _rendezvous(session: str, targets: Sequence[Target], allowed: Sequence[int]) -> int:
    """Highest random weight (Thaler and Ravishankar 1998) over those that may be chosen."""
    name = session.encode()

    def weight(position: int) -> int:
        target = targets[position]
        return xxh3_64_intdigest(name, xxh3_64_intdigest(f"{target.worker}/{target.rank}".encode()))

    return max(allowed, key=weight)
