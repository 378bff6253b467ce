"""Which models the mesh serves, and which workers may be routed together.

Built from what peers gossip of themselves.  The first ready worker of a model sets its fingerprint; a worker whose
fingerprint differs stays a member, is shown as `incompatible` with both values and is not routed.  A model stays known
for a while after its last worker left, so that clients see 503 and not 404.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from p2pdyn.core.types import (
    AGGREGATED,
    DECODE,
    FRONTEND,
    PREFILL,
    READY,
    ROLES,
    NodeId,
    PeerInfo,
    ServedModel,
    moves_alike,
    only_pulls,
)


@dataclass(slots=True)
class Model:
    """One model name. ``workers`` are the ready, compatible ones of all roles, by node id; ``last_seen`` is on the
    caller's clock."""

    name: str
    fingerprint: str
    served: ServedModel
    since: float
    last_seen: float
    workers: dict[NodeId, ServedModel] = field(default_factory=dict)
    roles: dict[NodeId, str] = field(default_factory=dict)

    @property
    def ready(self) -> int:
        """How many of its workers take requests: prefill workers do not."""
        return sum(self.roles[node] != PREFILL for node in self.workers)

    def concern(self) -> str:
        """The sentence that says what its workers' roles lack, or the empty string."""
        means = {role: {s.moves_kv for n, s in self.workers.items() if self.roles[n] == role} for role in ROLES}
        model, decode, prefill = f"model {self.name!r}", means[DECODE], means[PREFILL]
        if prefill and not decode and not means[AGGREGATED]:
            return f"{model} has prefill workers alone, which answer nothing: start one with --role decode"
        if prefill and not decode:
            return f"{model} has prefill workers and nobody that they could compute for: start one with --role decode"
        if decode and not prefill and all(map(only_pulls, decode)):
            return f"{model} has decode workers whose engine computes no prompts: start one with --role prefill"
        if decode and not prefill and not means[AGGREGATED]:
            return (
                f"{model} has decode workers alone, which compute each prompt themselves: start one with --role prefill"
            )
        if decode and prefill and not any(moves_alike(one, other) for one in decode for other in prefill):
            return f"{model} has no prefill and decode worker that move KV blocks alike: see --engine and --kv-transfer"
        return ""


class Catalog:
    """All known models of this peer's view."""

    def __init__(self, known_for: float) -> None:
        self._known_for = known_for
        self.models: dict[str, Model] = {}
        self.incompatible: dict[NodeId, str] = {}
        """Node id -> the sentence that says what differs."""

    def refresh(self, alive: Iterable[tuple[NodeId, PeerInfo]], now: float) -> None:
        """Rebuild from the alive peers. ``now`` in seconds."""
        ready: dict[NodeId, PeerInfo] = {
            node: info for node, info in alive if info.state == READY and info.role != FRONTEND and info.requests_port
        }
        for model in self.models.values():
            if model.workers:
                model.last_seen = now  # they were there until now, however long ago the view last changed
            model.workers = {node: served for node, served in model.workers.items() if node in ready}
            model.roles = {node: ready[node].role for node in model.workers}
        self.incompatible.clear()
        for node, info in ready.items():
            for served in info.models:
                self._place(node, info.role, served, now)
        self.expire(now)

    def expire(self, now: float) -> None:
        """Forget models whose last worker left too long ago; to be called as time passes, since no view may change."""
        for name in [n for n, m in self.models.items() if not m.workers and now - m.last_seen > self._known_for]:
            del self.models[name]

    def _place(self, node: NodeId, role: str, served: ServedModel, now: float) -> None:
        model = self.models.get(served.name)
        if model is None:
            model = self.models[served.name] = Model(served.name, served.fingerprint, served, now, now)
        elif model.fingerprint != served.fingerprint:
            others = [n for n, s in model.workers.items() if n != node and s.fingerprint == model.fingerprint]
            if others:
                model.workers.pop(node, None)
                model.roles.pop(node, None)
                self.incompatible[node] = (
                    f"model {served.name!r} is served with fingerprint {model.fingerprint} "
                    f"by {others[0]}, but with {served.fingerprint} here: {_difference(model.served, served)}"
                )
                return
            # Its last worker is gone: whoever is ready now sets the fingerprint anew.
            model.fingerprint = served.fingerprint
        model.served = served
        model.workers[node], model.roles[node] = served, role
        model.last_seen = now


def _difference(one: ServedModel, other: ServedModel) -> str:
    """Why their fingerprints differ."""
    if one.block_size != other.block_size:
        return f"block sizes {one.block_size} and {other.block_size}"
    if one.context != other.context:
        return f"contexts of {one.context} and {other.context} tokens"
    if one.card != other.card:
        what = "tokenizer, chat template, generation defaults or what the engine honours"
        return f"model cards {one.card} and {other.card} ({what})"
    return "other weights, engine arguments that stand for them, or hash parameters"
