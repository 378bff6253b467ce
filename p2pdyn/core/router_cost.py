"""What sending a prompt to each target costs, by policy; the lowest wins (docs/design/routing.md).

`kv` counts in seconds, so that unlike machines compare fairly:

    queued prefill + prefill of the uncached part + what the copies that it makes cost others
    + RECENT_WEIGHT * prefill sent there of late + DECODE_WEIGHT * slowdown of its decode

A block that the target lacks and others hold is computed again, and the copy pushes other blocks out and splits the
later turns of its conversation; so it counts MISS_WEIGHT times instead of once.  But of a prefix that many prompts
share another copy does good: with n prompts that share it, or n targets that hold it, a block counts
1 + (MISS_WEIGHT - 1) / n times.  What nobody holds has to be computed wherever the prompt goes, and counts once.

`kv-dynamo` is NVIDIA Dynamo's form, in blocks at weight 1, for comparison (lib/kv-router/src/scheduling/selector).  The
other policies do not look at the prompt.

Where blocks can be read from another target faster than they are computed (`Pull`), `kv` counts that instead, for them
and for what their copies weigh.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import NamedTuple

from p2pdyn.core.disagg import OVERHEAD_S
from p2pdyn.core.router_target import Target
from p2pdyn.core.types import NodeId, moves_alike

MISS_WEIGHT = 6.0
"""Of a block that one other target holds for one conversation."""
MIN_HIT_TOKENS = 64
"""A hit shorter than that is the chat template's first words, which all prompts share: going after it would keep short
prompts away from a worker that has just come."""
DECODE_WEIGHT = 1.0
"""A second of decode is a second of waiting; small by itself where prefill is the bottleneck."""
REQUEST_S = 0.001
"""For each open request: decides between workers that are otherwise equal, and no more than that."""

RECENT_WEIGHT = 0.15
"""For each second of prefill that it was sent of late, by any frontend: its sessions will come back to it, so a worker
that was kept busy for all of the last minute is worth 9 s less to a newcomer than an idle one. It spreads sessions
before queues do."""

HOST_CREDIT = 0.75
DISK_CREDIT = 0.25
"""What a block in a slower tier saves, against one on the device; Dynamo's."""


@dataclass(slots=True)
class View:
    """One prompt and all targets at one moment; lists run parallel to ``targets``."""

    tokens: int
    blocks: int
    block_size: int
    targets: Sequence[Target]
    allowed: Sequence[int]
    """Positions that may be chosen."""
    exclude: Collection[NodeId]
    """Workers that just failed the request."""
    queues: list[float]
    """Seconds of prefill queued."""
    have: list[int]
    """Leading blocks held in any tier."""
    matched: list[int]
    """The same, or predicted to be."""
    known: int
    """The most of these."""
    credit: Sequence[float]
    """The same in blocks, those in slower tiers at their credit."""
    shared: int
    """How many prompts, a second apart, have left the known path where this one does."""
    now: float
    output: float
    """Tokens that an answer is expected to have."""
    turn: int
    draws: tuple[float, float]
    """Uniform in [0, 1): all the randomness of this decision."""
    lender: int | None = None
    """Position of the target to take blocks from, -1 if there is none; None until somebody asks."""


class Pull(NamedTuple):
    """``source`` holds the prompt's leading ``blocks``. Those of them that the chosen target lacks come from there in
    ``pull_s``; it would compute them in ``compute_s``."""

    source: Target
    blocks: int
    pull_s: float
    compute_s: float


def pull_to(view: View, position: int) -> Pull | None:
    """What the target there would sooner take from another than compute."""
    target, matched = view.targets[position], view.matched[position]
    if not target.block_pull_s or view.known * view.block_size < MIN_HIT_TOKENS:
        return None
    lender = _lender(view)
    if lender < 0 or not _may_read(target, view.targets[lender]):
        return None
    missing = view.have[lender] - matched
    pull_s, compute_s = OVERHEAD_S + missing * target.block_pull_s, missing * view.block_size / target.tps
    return Pull(view.targets[lender], view.have[lender], pull_s, compute_s) if 0.0 < pull_s < compute_s else None


def _may_read(target: Target, source: Target) -> bool:
    return source.worker != target.worker and moves_alike(source.moves_kv, target.moves_kv)


def _lender(view: View) -> int:
    """Position of who holds the most of what others can read, the least busy of these; -1: nobody. Predicted blocks are
    not there yet."""
    if view.lender is None:
        targets, most = view.targets, max(view.have)
        holders = [position for position, have in enumerate(view.have) if have == most]
        if not any(_lends(view, position) for position in holders):
            holders = [position for position, have in enumerate(view.have) if have]
        offers = [
            (view.have[position], -view.queues[position], -targets[position].requests, position)
            for position in holders
            if _lends(view, position)
        ]
        view.lender = max(offers)[3] if most and offers else -1
    return view.lender


def _lends(view: View, position: int) -> bool:
    target = view.targets[position]
    return target.load.block_bytes > 0 and target.worker not in view.exclude


Scorer = Callable[[View], list[float]]

_behind = attrgetter("behind")


def kv(view: View) -> list[float]:
    """Seconds."""
    tokens, size, blocks, output = view.tokens, view.block_size, view.blocks, view.output
    now, matches, credits = view.now, view.matched, view.credit
    known = view.known if view.known * size >= MIN_HIT_TOKENS else 0
    if not known:
        matches, credits, copies = [0] * len(matches), [0.0] * len(matches), {0: 0.0}
    else:
        copies = _copies(matches, view.shared) if min(matches) < known else {known: 0.0}
    # Little work of late is no reason to wait for a place in a full batch: there it counts as the most of all.
    most_s = max(target.recent_s(now) for target in view.targets) if any(map(_behind, view.targets)) else 0.0
    costs: list[float] = []
    for target, queue, matched, credit in zip(view.targets, view.queues, matches, credits, strict=True):
        compute = (left if (left := tokens - credit * size) > 0.0 else 0.0) + copies[matched] * size
        cost = queue + compute / target.tps + REQUEST_S * target.requests
        if target.itl_per_block_s:
            cost += DECODE_WEIGHT * target.itl_per_block_s * (target.decode_blocks + blocks) * output
        if target.behind:
            cost += RECENT_WEIGHT * most_s
        elif target.work:
            cost += RECENT_WEIGHT * target.recent_s(now)
        if target.block_pull_s and matched < known:
            lender = _lender(view)
            spared = (view.have[lender] - matched) * (size / target.tps - target.block_pull_s) - OVERHEAD_S
            if spared > 0.0 and lender >= 0 and _may_read(target, view.targets[lender]):
                cost -= spared * (1.0 + copies[matched] / (known - matched))  # a copy weighs what making it costs
        costs.append(cost)
    return costs


def _copies(matched: list[int], shared: int) -> dict[int, float]:
    """Matched blocks -> what the copies of blocks that others hold weigh, in blocks, beyond their computation."""
    runs = sorted(matched, reverse=True)
    longest = runs[0]
    weights = {longest: 0.0}
    weight, last, extra = 0.0, longest, MISS_WEIGHT - 1.0
    for holders, run in enumerate(runs):
        if run < last:
            weight += (last - run) * extra / (holders if holders > shared else shared)
            weights[run] = weight
            last = run
    return weights


def kv_dynamo(view: View) -> list[float]:
    """Blocks: prefill outstanding with this prompt, less what is cached, and decode blocks. Dynamo's queue does not
    drain before a first token, so what we have outstanding counts whole."""
    return [
        max(0.0, (max(target.my_pending, queue * target.tps) + view.tokens) / view.block_size - credit)
        + target.decode_blocks
        + view.blocks
        for target, queue, credit in zip(view.targets, view.queues, view.credit, strict=True)
    ]


def least_loaded(view: View) -> list[float]:
    """Open requests."""
    return [float(target.requests) for target in view.targets]


def round_robin(view: View) -> list[float]:
    """Turns to wait, in the order of worker and rank."""
    order = sorted(view.allowed, key=lambda position: (view.targets[position].worker, view.targets[position].rank))
    costs = [inf] * len(view.targets)
    for turn, position in enumerate(order):
        costs[position] = float((turn - view.turn) % len(order))
    return costs


def uniform(view: View) -> list[float]:
    """All equal."""
    return [0.0] * len(view.targets)


def power_of_two(view: View) -> list[float]:
    """Open requests, of two drawn at random (Mitzenmacher 2001); the others are out."""
    allowed, (one, other) = view.allowed, view.draws
    first = int(one * len(allowed))
    drawn = {first, (first + 1 + int(other * (len(allowed) - 1))) % len(allowed)}
    costs = [inf] * len(view.targets)
    for position in (allowed[index] for index in drawn):
        costs[position] = float(view.targets[position].requests)
    return costs


POLICIES: dict[str, Scorer] = {
    "kv": kv,
    "kv-dynamo": kv_dynamo,
    "round-robin": round_robin,
    "random": uniform,
    "least-loaded": least_loaded,
    "power-of-two": power_of_two,
}
DEFAULT_POLICY = "kv"
