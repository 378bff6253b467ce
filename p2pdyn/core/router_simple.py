"""Which worker takes a request: policies over the targets that may be routed to.

A target's load is what its worker last reported, corrected by what this frontend has sent and finished since, so that
several frontends do not herd onto one worker between two reports.  KV-aware policies come with the KV index.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from p2pdyn.core.types import Load, NodeId


@dataclass(slots=True)
class Target:
    """A worker as this frontend sees it. ``mine`` counts this frontend's open requests there, ``others`` the other
    frontends' as of the last report."""

    worker: NodeId
    mine: int = 0
    others: int = 0
    load: Load = field(default_factory=Load)

    def report(self, load: Load) -> None:
        """Take over a report; what is not ours must be other frontends'."""
        self.load = load
        self.others = max(0, load.active_requests + load.queued - self.mine)

    @property
    def requests(self) -> int:
        return self.mine + self.others


Policy = Callable[[Sequence[Target]], Target]


def _round_robin(rng: random.Random) -> Policy:
    turn = rng.randrange(1 << 16)

    def choose(targets: Sequence[Target]) -> Target:
        nonlocal turn
        turn += 1
        return sorted(targets, key=lambda target: target.worker)[turn % len(targets)]

    return choose


def _random(rng: random.Random) -> Policy:
    return lambda targets: rng.choice(targets)


def _least(targets: Sequence[Target], rng: random.Random) -> Target:
    low = min(target.requests for target in targets)
    return rng.choice([target for target in targets if target.requests == low])


def _least_loaded(rng: random.Random) -> Policy:
    return lambda targets: _least(targets, rng)


def _power_of_two(rng: random.Random) -> Policy:
    """The less loaded of two drawn at random (Mitzenmacher 2001)."""
    return lambda targets: _least(rng.sample(targets, min(2, len(targets))), rng)


POLICIES: dict[str, Callable[[random.Random], Policy]] = {
    "least-loaded": _least_loaded,
    "round-robin": _round_robin,
    "random": _random,
    "power-of-two": _power_of_two,
}
DEFAULT_POLICY = "least-loaded"


def make_policy(name: str, rng: random.Random) -> Policy:
    """The policy called ``name``; KeyError if there is none. A policy is never asked about zero targets."""
    return POLICIES[name](rng)
