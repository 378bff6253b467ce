"""What a frontend tells of its requests, its routing and what it knows of KV caches, for /metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from p2pdyn.core.flight import Flights
from p2pdyn.core.kvstream import DEGRADED, EXACT, GAP, NEW, REPLAYING
from p2pdyn.core.routes import Key
from p2pdyn.core.types import Load, NodeId
from p2pdyn.http.backend import Metric
from p2pdyn.net.kv_feed import KvFeed

DECISION_S = (25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3)
STATES = (NEW, REPLAYING, EXACT, GAP, DEGRADED)
WORST = (DEGRADED, GAP, NEW, REPLAYING, EXACT)
"""Which state speaks for a worker of several ranks."""
ADDED = ("active_requests", "active_blocks", "queued", "kv_used", "kv_total", "prefill_tokens_queued", "prefill_tps")
REPAIRS = ("gaps", "degraded", "replays", "snapshots", "failed", "malformed", "ignored")


def frontend_metrics(
    flights: Flights,
    feed: KvFeed,
    loads: Mapping[Key, Load],
    links: Mapping[NodeId, bool],
    links_lost: int,
) -> list[Metric]:
    routes = flights.routes
    plain: list[tuple[str, str, str, float]] = [
        ("p2pdyn_frontend_inflight_requests", "gauge", "Open generations of this frontend.", len(flights.open)),
        ("p2pdyn_frontend_migrations_total", "counter", "Generations moved to another worker.", flights.migrations),
        (
            "p2pdyn_frontend_killers_total",
            "counter",
            "Generations ended as every worker that ran them died.",
            flights.trials.blame.convicted,
        ),
        ("p2pdyn_frontend_token_holes_total", "counter", "Generations whose token frames were lost.", flights.holes),
        ("p2pdyn_frontend_stale_frames_total", "counter", "Token frames of earlier attempts.", flights.stale),
        ("p2pdyn_frontend_links_lost_total", "counter", "Worker links that went down.", links_lost),
        ("p2pdyn_router_prompt_blocks_total", "counter", "KV blocks of routed prompts.", routes.prompt_blocks),
        (
            "p2pdyn_router_matched_blocks_total",
            "counter",
            "Of these, what the chosen worker held or was about to hold.",
            routes.matched_blocks,
        ),
        ("p2pdyn_prompt_tokens_total", "counter", "Prompt tokens computed or found.", flights.prompt_tokens),
        (
            "p2pdyn_cached_tokens_total",
            "counter",
            "Of these, what workers found in their prefix caches: the hit rate is the quotient.",
            flights.cached_tokens,
        ),
        (
            "p2pdyn_router_pulls_total",
            "counter",
            "Prefixes to be read from another worker instead of computed.",
            flights.pulls,
        ),
        (
            "p2pdyn_router_prefill_fallbacks_total",
            "counter",
            "Prompts that a prefill worker was to compute and did not, or could not hold.",
            flights.prefill_fallbacks,
        ),
        ("p2pdyn_kv_index_blocks", "gauge", "Blocks in the KV index.", len(feed.index)),
    ]
    rows: list[Metric] = [(name, kind, text, [({}, float(value))]) for name, kind, text, value in plain]
    rows.append(_prefill_metric(flights))
    up = [({"worker": str(worker)}, float(state)) for worker, state in links.items()]
    rows.append(("p2pdyn_frontend_worker_link_up", "gauge", "1 while requests can be sent to the worker.", up))
    waiting = [({"model": name}, float(count)) for name, count in routes.queued().items()]
    rows.append(("p2pdyn_router_queued_requests", "gauge", "Requests that wait as all workers are saturated.", waiting))
    return rows + _worker_metrics(loads) + _stream_metrics(feed)


def _prefill_metric(flights: Flights) -> Metric:
    text = "Prompts for decode workers, by where they were to be computed: by a prefill worker, or there."
    counts = {"remote": flights.prefills_remote, "local": flights.prefills_local}
    return ("p2pdyn_router_prefills_total", "counter", text, [({"where": k}, float(v)) for k, v in counts.items()])


def _worker_metrics(loads: Mapping[Key, Load]) -> list[Metric]:
    """As each routing target last reported."""
    told = {
        "active_requests": "Requests that run.",
        "queued": "Requests that wait in its engine.",
        "active_blocks": "KV blocks in use.",
        "kv_used": "KV blocks held.",
        "kv_total": "KV blocks there are.",
        "prefill_tokens_queued": "Prompt tokens still to compute.",
        "prefill_tps": "Prompt tokens it computes a second.",
        "itl_ms": "Time between tokens.",
    }
    return [
        (
            f"p2pdyn_worker_{name}",
            "gauge",
            f"{text[:-1]}, as last reported.",
            [
                ({"worker": str(worker), "rank": str(rank)}, float(getattr(load, name)))
                for (worker, rank), load in loads.items()
            ],
        )
        for name, text in told.items()
    ]


def _stream_metrics(feed: KvFeed) -> list[Metric]:
    states = Counter(stream.state for stream in feed.streams.values())
    totals: Counter[str] = Counter(feed.retired)
    for stream in feed.streams.values():
        totals.update(asdict(stream.counters))
    return [
        ("p2pdyn_kv_streams", "gauge", "KV streams by state.", [({"state": s}, float(states[s])) for s in STATES]),
        (
            "p2pdyn_kv_stream_events_total",
            "counter",
            "Gaps noticed, repairs asked for, messages that did not parse or came twice.",
            [({"event": name}, float(totals[name])) for name in REPAIRS],
        ),
    ]


def kv_report(feed: KvFeed) -> dict[NodeId, dict[str, Any]]:
    """By worker, what `peers --json` says: of several ranks the worst state, the highest seq, all blocks."""
    found: dict[NodeId, dict[str, Any]] = {}
    for (worker, _), stream in feed.streams.items():
        one = found.setdefault(worker, {"stream": EXACT, "seq": 0, "blocks": 0, "why": ""})
        if WORST.index(stream.state) <= WORST.index(one["stream"]):
            one["stream"], one["why"] = stream.state, stream.why
        one["seq"] = max(one["seq"], stream.seq)
        one["blocks"] += stream.blocks
    return found


def sum_loads(loads: Mapping[Key, Load]) -> dict[NodeId, Load]:
    """By worker: counts and prefill speed added up over its ranks, the slowest rank's times."""
    found: dict[NodeId, Load] = {}
    for (worker, _), load in loads.items():
        one = found.setdefault(worker, Load())
        for name in ADDED:
            setattr(one, name, getattr(one, name) + getattr(load, name))
        one.itl_ms = max(one.itl_ms, load.itl_ms)
    return found
