"""Whether a prompt is computed where it will be decoded, or by a prefill worker that hands its KV blocks over.

Seconds against seconds (docs/design/kv-transfer.md, "When").  Local: what is queued at the decode worker, the prompt,
and what computing it there takes from the answers that stream from it.  Remote: what is queued at the prefill worker,
what the prompt lacks there, and the way of its blocks.  Pure arithmetic; who the two are is the router's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from p2pdyn.core.router_target import DEFAULT_TPS

MIN_REMOTE_TOKENS = 128
"""Computed elsewhere only if so many are not cached, while nobody's speed is known. A hand-over costs about 10 ms, 50
tokens at the speed assumed, and of a prompt of a few blocks much is in the last one, which is not handed over."""

STALL_WEIGHT = 0.25
"""Of a second by which a streaming answer is held up, against one of waiting for the first token: readers are behind
the stream as a rule. One answer more than there are counts, for whoever comes meanwhile: that is what a decode worker
is kept free for."""

OVERHEAD_S = 0.010
"""Of any pull: asking for the blocks (up to a step of their owner's engine), starting the read, having it confirmed."""
PULL_BPS = 300e6
"""Assumed of a reader that has measured none: the slowest tcp path seen."""
TOKEN_PULL_S = 3e-6
"""A token's KV by an engine's own connector, until some have been timed. H200s over NVLink, 33 GB/s: 12,000 tokens took
45 ms with the overhead."""

REMOTE = "remote"
SHORT = "short"
LOCAL = "local is faster"
NOBODY = "no prefill worker"
BUSY = "prefill busy"


@dataclass(slots=True)
class Side:
    """A worker that could compute the prompt: ``uncached`` tokens of it, behind ``queue_s`` seconds of others, at
    ``tps`` tokens a second (0: not measured). ``decodes`` answers stream from it meanwhile; ``pull_s`` is what it would
    wait for blocks of a third one first."""

    uncached: int
    queue_s: float
    tps: float
    decodes: int = 0
    pull_s: float = 0.0


class Verdict(NamedTuple):
    """``remote_s`` is None if there is nobody to compare with."""

    remote: bool
    local_s: float
    remote_s: float | None
    why: str


def pull_s(tokens: int, block_size: int, block_bytes: int, bps: float) -> float:
    """Seconds to read the KV of ``tokens``; ``block_bytes`` 0: an engine's own connector does, ``bps`` tokens a
    second."""
    if not block_bytes:
        return OVERHEAD_S + (tokens / bps if bps else tokens * TOKEN_PULL_S)
    return OVERHEAD_S + tokens / block_size * block_bytes / (bps or PULL_BPS)


def judge(local: Side, prefill: Side | None, block_size: int, moving_s: float, saturated: bool = False) -> Verdict:
    """``moving_s``: what moving the blocks that the decode worker lacks takes. ``saturated``: the prefill worker, best
    as it is, should get no more."""
    guess = local.tps or (prefill.tps if prefill is not None else 0.0)
    compute = local.uncached / (guess or DEFAULT_TPS)
    local_s = local.queue_s + local.pull_s + compute * (1.0 + STALL_WEIGHT * (local.decodes + 1))
    short = local.uncached <= block_size
    if prefill is None:
        return Verdict(False, local_s, None, SHORT if short else NOBODY)
    idle_s = prefill.uncached / (prefill.tps or guess or DEFAULT_TPS) + moving_s
    remote_s = idle_s + prefill.queue_s
    if short or (not guess and local.uncached < MIN_REMOTE_TOKENS):
        return Verdict(False, local_s, remote_s, SHORT)
    if saturated:
        return Verdict(False, local_s, remote_s, BUSY)
    if remote_s < local_s if guess else prefill.queue_s <= local.queue_s:
        return Verdict(True, local_s, remote_s, REMOTE)
    return Verdict(False, local_s, remote_s, LOCAL if guess and idle_s >= local_s else BUSY)
