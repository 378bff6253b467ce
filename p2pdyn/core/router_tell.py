"""A decision in words and numbers, for `p2pdyn explain` and the log; to be asked before anything else happens."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from p2pdyn.core.admission import Limits, saturation
from p2pdyn.core.router import Decision, Router
from p2pdyn.core.types import NodeId


@dataclass(frozen=True, slots=True)
class Candidate:
    """A target as the decision saw it. ``cost`` is None where the policy did not consider it."""

    id: NodeId
    dp_rank: int
    matched: int
    active_prefill_blocks: int
    decode_blocks: int
    cost: float | None
    state: str
    """ready, saturated, excluded"""
    role: str


def candidates(decision: Decision, limits: Limits | None) -> list[Candidate]:
    """Every target."""
    view = decision.view
    found = []
    for position, target in enumerate(view.targets):
        queue, cost = view.queues[position], decision.costs[position]
        state = "excluded" if target.worker in decision.ask.exclude else "ready"
        if state == "ready" and limits is not None and saturation(target, queue, limits):
            state = "saturated"
        found.append(
            Candidate(
                target.worker,
                target.rank,
                view.matched[position],
                round(queue * target.tps / view.block_size),
                target.decode_blocks,
                cost if isfinite(cost) else None,
                state,
                target.role,
            )
        )
    return found


def explanation(router: Router, model: str, decision: Decision) -> dict[str, Any]:
    """`p2pdyn explain --json`. ``prefill``: of a decode worker, whether a prefill worker computes the prompt, and the
    seconds of either; ``pull``: so many blocks are read from that worker in ``pull_s`` instead of computed."""
    rows = candidates(decision, router.limits)
    return {
        "model": model,
        "prompt_blocks": decision.view.blocks,
        "chosen": decision.target.worker,
        "chosen_rank": decision.target.rank,
        "policy": router.policy,
        "why": decision.why,
        "candidates": [{name: getattr(one, name) for name in Candidate.__slots__} for one in rows],
        "prefill": _prefill(decision),
        "pull": _pull(decision),
    }


def _prefill(decision: Decision) -> dict[str, Any] | None:
    if decision.prefill is None:
        return None
    target, verdict = decision.prefill
    return {"worker": None if target is None else target.worker, **verdict._asdict()}


def _pull(decision: Decision) -> dict[str, Any] | None:
    """Nothing is taken from a third worker where a prefill worker hands all over."""
    pull, prefill = decision.pull, decision.prefill
    if pull is None or (prefill is not None and prefill.verdict.remote):
        return None
    blocks = pull.blocks - decision.matched
    return {"worker": pull.source.worker, "blocks": blocks, "pull_s": pull.pull_s, "compute_s": pull.compute_s}


def line(router: Router, decision: Decision) -> str:
    """The same in one line, for the log."""
    rows = ", ".join(
        f"{one.id}/{one.dp_rank} {one.state} matched {one.matched} prefill {one.active_prefill_blocks} "
        f"decode {one.decode_blocks} cost {'-' if one.cost is None else format(one.cost, '.4g')}"
        for one in candidates(decision, router.limits)
    )
    notes = decision.why
    if (prefill := _prefill(decision)) is not None:
        notes += f", prompt {'handed over by ' + str(prefill['worker']) if prefill['remote'] else prefill['why']}"
    if (pull := _pull(decision)) is not None:
        notes += f", {pull['blocks']} blocks from {pull['worker']}"
    return f"{decision.view.blocks} blocks to {decision.target.worker} by {router.policy} ({notes}): {rows}"
