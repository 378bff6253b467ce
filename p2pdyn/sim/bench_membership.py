"""``p2pdyn bench membership``: how fast everybody knows of a death, what it costs, how often the living are accused."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from p2pdyn.core.actions import MemberChanged
from p2pdyn.core.membership import Member, MembershipConfig
from p2pdyn.core.types import DEAD, SUSPECT, NodeId, Version
from p2pdyn.sim.cluster import Cluster, Node
from p2pdyn.sim.network import TcpNetwork

WARM_S = 20.0
"""Before the first crash, and not measured: the first probes open their links all at once."""

TAIL_S = 30.0
"""After the last crash, so that every view has time to notice it."""

REJOIN_S = 30.0
"""A crashed node starts again, with the same id, after this long."""

MEET_S = 5.0
"""A node that ran shorter than this may not be known to all, nor know all: one that does not know it cannot miss it."""


class _Watch:
    """Counts what every node believes against what is true."""

    def __init__(self) -> None:
        self.cluster: Cluster
        self.crashed: dict[NodeId, tuple[float, set[NodeId]]] = {}
        """Victim -> when, and the observers that have not noticed yet."""
        self.delays: list[float] = []
        self.missed = 0
        self.false_deaths = 0
        self.suspicions = 0
        self.suspected: set[tuple[NodeId, Version]] = set()
        self.up: dict[NodeId, bool] = {}
        self.since: dict[NodeId, float] = {}
        self.epochs: dict[NodeId, int] = {}

    def __call__(self, node: Node, change: MemberChanged) -> None:
        member = change.member
        if member.state == DEAD and change.was != DEAD:
            if self._lives(member):
                self.false_deaths += 1
            elif member.id in self.crashed:
                when, waiting = self.crashed[member.id]
                if node.id in waiting:
                    waiting.discard(node.id)
                    self.delays.append(self.cluster.clock.now - when)
        elif member.state == SUSPECT and change.was != SUSPECT and self._lives(member):
            self.suspicions += 1
            self.suspected.add((member.id, member.version))

    def _lives(self, member: Member) -> bool:
        """Whether the accused life of the member is running."""
        return self.up[member.id] and self.epochs[member.id] == member.version.epoch

    def crash(self, victim: Node) -> None:
        self.up[victim.id] = False
        others = {node.id for node in self.cluster.nodes if node.up and node is not victim and self._met(node, victim)}
        self.crashed[victim.id] = (self.cluster.clock.now, others)
        for _, waiting in self.crashed.values():
            waiting.discard(victim.id)

    def _met(self, observer: Node, victim: Node) -> bool:
        """Whether the observer should know this life of the victim: both ran for a while, or it does already."""
        if self.cluster.clock.now - max(self.since[observer.id], self.since[victim.id]) >= MEET_S:
            return True
        member = observer.core.members.get(victim.id)
        return member is not None and member.live and member.version.epoch == self.epochs[victim.id]

    def started(self, node: Node) -> None:
        self.up[node.id] = True
        self.since[node.id] = self.cluster.clock.now
        self.epochs[node.id] = node.core.local.version.epoch

    def close(self, victim: Node) -> None:
        _, waiting = self.crashed.pop(victim.id)
        self.missed += len(waiting)


def run(
    nodes: int = 1000,
    loss: float = 0.1,
    links: str = "tcp",
    seed: int = 1,
    seconds: float = 600.0,
    crash_every_s: float = 20.0,
    config: MembershipConfig | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Simulate ``nodes`` for ``seconds``, with one host crash (no reset, no answer) each ``crash_every_s`` on average.

    Returns seconds over all (observer, victim) pairs, from the crash to the observer's own view, and bytes sent.
    """
    progress = progress or (lambda text: print(text, file=sys.stderr, flush=True))
    cpu = time.process_time()
    watch = _Watch()
    cluster = watch.cluster = Cluster(nodes, seed, links, loss, config, joined=True, on_change=watch)
    for node in cluster.nodes:
        watch.started(node)
    cluster.run(WARM_S)
    start = [(node.sent.copy(), node.sent_messages) for node in cluster.nodes]
    watch.suspicions = watch.false_deaths = 0
    watch.suspected.clear()
    crashes = _schedule(cluster, watch, seed, seconds, crash_every_s)
    begun = cluster.clock.now
    while cluster.clock.now < begun + seconds:
        cluster.run(min(10.0, begun + seconds - cluster.clock.now))
        done = cluster.clock.now - begun
        progress(f"{links} {nodes} nodes: {done:.0f} of {seconds:.0f} s, {time.process_time() - cpu:.0f} s of CPU")
    if isinstance(cluster.network, TcpNetwork):
        cluster.network.settle()
    for victim in [node for node in cluster.nodes if node.id in watch.crashed]:
        watch.close(victim)
    result = _result(cluster, watch, start, seconds)
    settings = {"nodes": nodes, "loss": loss, "links": links, "seed": seed, "seconds": seconds, "crashes": crashes}
    return {**settings, **result, "cpu_s": round(time.process_time() - cpu, 1), "constants": asdict(cluster.config)}


def _schedule(cluster: Cluster, watch: _Watch, seed: int, seconds: float, every: float) -> int:
    """Arrange all crashes and restarts; returns the number of crashes."""
    rng = random.Random(seed + 2)

    def crash() -> None:
        alive = [node for node in cluster.nodes if node.up]
        if len(alive) < 2:
            return
        victim = rng.choice(alive)
        watch.crash(victim)
        cluster.crash(victim)
        cluster.clock.at(cluster.clock.now + REJOIN_S, restart, victim)

    def restart(victim: Node) -> None:
        watch.close(victim)
        cluster.restart(victim, rng.choice([node for node in cluster.nodes if node.up]))
        watch.started(victim)

    begun, count = cluster.clock.now, 0
    at = rng.uniform(0.2, 1.0) * every
    while at < seconds - TAIL_S:
        cluster.clock.at(begun + at, crash)
        count += 1
        at += rng.uniform(0.5, 1.5) * every
    return count


def _result(cluster: Cluster, watch: _Watch, start: list[tuple[Counter[str], int]], seconds: float) -> dict[str, Any]:
    by_kind = [n.sent - b for n, (b, _) in zip(cluster.nodes, start, strict=True)]
    sent = [kinds.total() / seconds for kinds in by_kind]
    busiest = max(by_kind, key=Counter.total)
    messages = [(n.sent_messages - m) / seconds for n, (_, m) in zip(cluster.nodes, start, strict=True)]
    delays = sorted(watch.delays)
    pairs = len(delays) + watch.missed
    return {
        "pairs": pairs,
        "missed": watch.missed,
        "detect_p50_s": _quantile(delays, watch.missed, 0.50),
        "detect_p99_s": _quantile(delays, watch.missed, 0.99),
        "detect_max_s": _quantile(delays, watch.missed, 1.0),
        "false_deaths": watch.false_deaths,
        "false_suspicions": len(watch.suspected),
        "false_suspicion_views": watch.suspicions,
        "bytes_per_s_mean": round(sum(sent) / len(sent), 1),
        "bytes_per_s_max": round(max(sent), 1),
        "bytes_per_s_by_kind": _rates(sum(by_kind, Counter()), seconds * len(by_kind)),
        "bytes_per_s_by_kind_of_busiest": _rates(busiest, seconds),
        "messages_per_s_mean": round(sum(messages) / len(messages), 2),
        "connections_opened": getattr(cluster.network, "opened", 0),
    }


def _rates(kinds: Counter[str], seconds: float) -> dict[str, float]:
    return {kind: round(count / seconds, 1) for kind, count in kinds.most_common()}


def _quantile(ordered: list[float], missed: int, share: float) -> float | None:
    """Over all pairs, those never noticed counted as endless: None."""
    if not ordered and not missed:
        return None
    place = min(len(ordered) + missed - 1, int(share * (len(ordered) + missed)))
    return round(ordered[place], 3) if place < len(ordered) else None


def render(result: dict[str, Any]) -> str:
    """A page for people."""

    def seconds(name: str) -> str:
        value = result[name]
        return "never" if value is None else f"{value:.2f} s"

    lines = [
        f"{result['nodes']} nodes, {result['links']} links, {100 * result['loss']:g} % loss, "
        f"{result['seconds']:g} simulated seconds, {result['crashes']} crashes, seed {result['seed']}",
        f"crash to dead, over {result['pairs']} (observer, victim) pairs:  p50 {seconds('detect_p50_s')}  "
        f"p99 {seconds('detect_p99_s')}  max {seconds('detect_max_s')}  missed {result['missed']}",
        f"false deaths {result['false_deaths']}, false suspicions {result['false_suspicions']}",
        f"sent by a node: mean {result['bytes_per_s_mean'] / 1000:.2f} kB/s, "
        f"most {result['bytes_per_s_max'] / 1000:.2f} kB/s, {result['messages_per_s_mean']:.1f} messages/s",
        f"{result['cpu_s']} s of CPU; constants: " + ", ".join(f"{k}={v}" for k, v in result["constants"].items()),
    ]
    return "\n".join(lines)
