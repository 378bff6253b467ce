"""The cluster as one peer sees it: the body of `p2pdyn peers --json` and ``GET /p2p/peers``, and its metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from p2pdyn.core.types import INCOMPATIBLE, READY, Load, NodeId

if TYPE_CHECKING:
    from p2pdyn.http.backend import Metric
    from p2pdyn.net.mesh import Mesh, Peer
    from p2pdyn.net.worker import WorkerService


def cluster_report(
    cluster: str,
    mesh: Mesh,
    loads: Mapping[NodeId, Load],
    streams: Mapping[NodeId, dict[str, Any]],
    incompatible: Mapping[NodeId, str],
    transfers: dict[str, Any] | None,
) -> dict[str, Any]:
    """``loads`` and ``streams`` hold what is known of workers' loads and KV caches, one's own included; the others'
    are null, and NEW. ``transfers`` are this peer's own, null where it moves no KV blocks."""
    peers = [
        _peer(peer, loads.get(peer.id), streams.get(peer.id), incompatible.get(peer.id)) for peer in mesh.peers.values()
    ]
    peers.sort(key=lambda peer: (str(peer["name"]), str(peer["id"])))
    return {
        "cluster": cluster,
        "self": mesh.node,
        "peers": peers,
        "refused": mesh.refused(),
        "alarms": mesh.alarms(),
        "transfers": transfers,
    }


def _peer(peer: Peer, load: Load | None, kv: dict[str, Any] | None, incompatible: str | None) -> dict[str, Any]:
    info = peer.info
    state, detail = (info.state, info.detail) if peer.state == "alive" else (peer.state, "")
    if incompatible is not None and state == READY:
        state, detail = INCOMPATIBLE, incompatible
    return {
        "id": peer.id,
        "name": info.name,
        "version": info.version,
        "state": state,
        "detail": detail,
        "progress": info.progress,
        "role": info.role,
        "engine": info.engine,
        "engine_version": info.engine_version,
        "models": [served.name for served in info.models],
        "address": str(peer.address),
        "http": info.http or None,
        "epoch": peer.version.epoch,
        "incarnation": peer.version.incarnation,
        "last_seen_s": round(peer.last_seen_s, 3),
        "clock_s": None if peer.clock_s is None else round(peer.clock_s, 3),
        "load": {
            "active_requests": load.active_requests if load else None,
            "active_blocks": load.active_blocks if load else None,
            "queued": load.queued if load else None,
            "kv_used": load.kv_used if load else None,
            "kv_total": load.kv_total if load else None,
        },
        "kv": kv or {"stream": "NEW", "seq": 0, "blocks": 0, "why": ""},
    }


def mesh_metrics(mesh: Mesh, worker: WorkerService | None) -> list[Metric]:
    """Membership, control traffic and, on a worker, what it has served."""
    states: Counter[str] = Counter()
    for peer in mesh.peers.values():
        states[peer.info.state if peer.state == "alive" else peer.state] += 1
    rows: list[Metric] = [
        ("p2pdyn_mesh_peers", "gauge", "Members by state.", [({"state": s}, float(n)) for s, n in states.items()]),
        (
            "p2pdyn_mesh_events_total",
            "counter",
            "Control traffic (messages, bytes) and what was refused or dropped, by reason.",
            [({"event": event}, float(count)) for event, count in sorted(mesh.counters.items())],
        ),
        ("p2pdyn_mesh_alarms", "gauge", "Alarms that people should look at.", [({}, float(len(mesh.alarms())))]),
        ("p2pdyn_loop_lag_seconds", "gauge", "Worst loop delay of the last minute.", [({}, mesh.loop_lag_s)]),
    ]
    if worker is not None:
        rows += [
            ("p2pdyn_worker_requests_total", "counter", "Requests admitted.", [({}, float(worker.requests_total))]),
            ("p2pdyn_worker_tokens_total", "counter", "Tokens sent.", [({}, float(worker.generated_tokens))]),
            ("p2pdyn_worker_malformed_total", "counter", "Unreadable requests.", [({}, float(worker.malformed))]),
        ]
        if worker.transfers is not None:
            rows += _transfer_metrics(worker.transfers.report())
    return rows


def _transfer_metrics(report: dict[str, Any]) -> list[Metric]:
    """``report`` as :meth:`p2pdyn.net.transfers.Transfers.report` gives it."""

    def by(label: str, counts: Mapping[str, int]) -> list[tuple[dict[str, str], float]]:
        return [({label: name}, float(count)) for name, count in counts.items()]

    return [
        ("p2pdyn_kv_leases", "gauge", "Leases on our KV blocks by state.", by("state", report["leases"])),
        ("p2pdyn_kv_blocks_lent", "gauge", "KV blocks in leases.", [({}, float(report["blocks_lent"]))]),
        ("p2pdyn_kv_leases_expired_total", "counter", "Leases that expired.", [({}, float(report["expired"]))]),
        ("p2pdyn_kv_claims_refused_total", "counter", "Claims refused.", [({}, float(report["refused"]))]),
        ("p2pdyn_kv_pulls", "gauge", "Pulls of others' KV blocks by state.", by("state", report["pulls"])),
        ("p2pdyn_kv_pulls_total", "counter", "Pulls by outcome.", by("outcome", report["outcomes"])),
        ("p2pdyn_kv_pull_failures_total", "counter", "Pulls that failed, by reason.", by("why", report["failures"])),
        ("p2pdyn_kv_reads", "gauge", "Reads under way.", [({}, float(report["reads"]))]),
        ("p2pdyn_kv_read_bytes_total", "counter", "Bytes read.", [({}, float(report["bytes_read"]))]),
        ("p2pdyn_kv_read_bytes_per_second", "gauge", "Speed of reads.", [({}, float(report["bandwidth"]))]),
    ]
