"""Which fault hits whom, when and for how long: a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

WORKER_KINDS = {
    "kill": 3, "stop": 3, "cable": 2, "cut": 2, "reset": 2, "deaf": 2, "mute": 2, "lossy": 2, "slow": 2, "pair": 2,
    "twin": 2, "clock": 2, "disk": 2, "split": 1,
}  # fmt: skip
"""Kind -> weight, of those that can hit a worker."""
FRONTEND_KINDS = {"kill": 3, "stop": 2, "cut": 2, "reset": 2, "lossy": 1, "slow": 1, "clock": 1, "disk": 1}
FRONTEND_SHARE = 0.2
ENDS_A_PROCESS = frozenset(("kill", "disk"))
LASTS_S = (2.0, 9.0)
SETTLE_S = 4.0
"""A peer is left alone for so long after its last fault has ended; a split touches all."""
MOST_WORKERS, MOST_FRONTENDS = 2, 1
"""Under a fault at once: so there is always a healthy one to serve."""


@dataclass(frozen=True)
class Fault:
    """``at`` and ``lasts`` in seconds. ``others`` are the far ends of a pair's or a split's cut links; ``amount`` is a
    share (lossy), milliseconds (slow) or seconds (clock)."""

    at: float
    kind: str
    victim: str
    lasts: float
    others: tuple[str, ...] = ()
    amount: float = 0.0

    @property
    def until(self) -> float:
        return self.at + self.lasts

    def __str__(self) -> str:
        amount = f" {self.amount:g}" if self.amount else ""
        others = f" from {','.join(self.others)}" if self.others else ""
        return f"{self.at:6.1f} s  {self.kind}{amount} {self.victim}{others} for {self.lasts:.1f} s"


def schedule(
    seed: int,
    seconds: float,
    *,
    frontends: Sequence[str],
    workers: Sequence[str],
    anchors: Collection[str] = (),
    without: Collection[str] = (),
    every: float = 5.0,
) -> list[Fault]:
    """A fault about each ``every`` seconds, the last one healed before ``seconds``. ``anchors`` are spared from faults
    that end the process, so that their memory can be watched throughout; ``without`` are kinds left out."""
    rng = random.Random(seed)
    faults: list[Fault] = []
    at = rng.uniform(0.5, 1.5) * every / 2
    while at + LASTS_S[1] + SETTLE_S < seconds:
        made = _fault(rng, at, faults, frontends, workers, anchors, without)
        if made is not None:
            faults.append(made)
        at += rng.uniform(0.6, 1.4) * every
    return faults


def _fault(
    rng: random.Random,
    at: float,
    before: Sequence[Fault],
    frontends: Sequence[str],
    workers: Sequence[str],
    anchors: Collection[str],
    without: Collection[str],
) -> Fault | None:
    on = [fault for fault in before if fault.until + SETTLE_S > at]
    if any(fault.kind == "split" for fault in on):
        return None
    hit = {fault.victim for fault in on}
    at_frontend = rng.random() < FRONTEND_SHARE
    group, most = (frontends, MOST_FRONTENDS) if at_frontend else (workers, MOST_WORKERS)
    free = [peer for peer in group if peer not in hit]
    if len(hit & set(group)) >= most or not free:
        return None
    victim = rng.choice(free)
    kinds = {
        kind: weight
        for kind, weight in (FRONTEND_KINDS if at_frontend else WORKER_KINDS).items()
        if kind not in without
        and not (kind in ENDS_A_PROCESS and victim in anchors)
        and not (kind == "split" and on)
        and not (kind == "twin" and any(fault.kind == "twin" for fault in on))
    }
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    lasts = round(rng.uniform(*LASTS_S), 1)
    others, amount = _details(rng, kind, victim, frontends, workers)
    return Fault(round(at, 1), kind, victim, lasts, others, amount)


def _details(
    rng: random.Random, kind: str, victim: str, frontends: Sequence[str], workers: Sequence[str]
) -> tuple[tuple[str, ...], float]:
    if kind == "pair":
        return (rng.choice(frontends),), 0.0
    if kind == "split":  # the victim's half against the other, a frontend in each
        near = {victim, *rng.sample([w for w in workers if w != victim], len(workers) // 2 - 1), rng.choice(frontends)}
        return tuple(peer for peer in (*frontends, *workers) if peer not in near), 0.0
    if kind == "lossy":
        return (), 0.2
    if kind == "slow":
        return (), float(rng.randrange(30, 151))
    if kind == "clock":
        return (), float(rng.choice((-1, 1)) * rng.choice((3, 90, 7200)))
    return (), 0.0
