"""`p2pdyn bench route`: a trace through the real router core against simulated workers, policies side by side.

What is real: Router, KvIndex, Predictions, Target, the workers' prefix caches and their events.  What is simulated:
time, prefill (serial, a fixed number of tokens a second), decode (10 ms a token, without an effect on prefill).

Trace time is scaled so that round-robin keeps the workers busy with prefill for the share ``utilization`` of the time
from the first arrival to the last.  As prefill is serial and in order, what round-robin hits does not depend on the
scale, so one pass over the trace without time gives its busy seconds.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from typing import Any

from p2pdyn.constants import LOAD_EVENT_S, LOAD_SOON_S
from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.router import Ask, Router
from p2pdyn.core.router_target import Target
from p2pdyn.sim.route_trace import BLOCK, Request, TraceError, spread
from p2pdyn.sim.route_worker import ITL_S, Job, Worker
from p2pdyn.wire.kvpack import DEVICE

TRANSIT_S = 0.002
"""From a worker to a frontend, for events and reports; requests take as long the other way."""


@dataclass(frozen=True, slots=True)
class Setting:
    """``tps``: prefill tokens a second of each worker; ``cache`` in blocks, inf for no bound."""

    tps: tuple[float, ...]
    cache: float = inf
    utilization: float = 0.75
    frontends: int = 1
    seed: int = 1
    spread_s: float = 0.0
    """See :func:`~p2pdyn.sim.route_trace.spread`."""


@dataclass(slots=True)
class Result:
    """``ttft`` in seconds, in order of arrival."""

    hit_blocks: int
    ttft: list[float]
    busy_s: list[float]
    requests: list[int]

    @property
    def imbalance(self) -> float:
        """The busiest worker's busy time over the mean."""
        return max(self.busy_s) * len(self.busy_s) / sum(self.busy_s)


class Replay:
    """One policy over one trace. Requests arrive at ``request.at * scale``."""

    def __init__(self, trace: Sequence[Request], scale: float, policy: str, setting: Setting) -> None:
        self._trace = trace
        self._scale = scale
        self._policy = policy
        self._rng = random.Random(setting.seed)
        self._index = KvIndex()
        self._workers = [Worker(number, tps, setting.cache) for number, tps in enumerate(setting.tps)]
        self._slots = [self._index.add() for _ in self._workers]
        self._routers = [
            Router(policy, random.Random(self._rng.random()), self._index, limits=None)
            for _ in range(setting.frontends)
        ]
        self._targets = [
            [Target(worker.id, slot=slot) for worker, slot in zip(self._workers, self._slots, strict=True)]
            for _ in self._routers
        ]
        self._number = {worker.id: number for number, worker in enumerate(self._workers)}
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self.now = 0.0
        self._ttft = [0.0] * len(trace)

    def run(self, progress: Callable[[str], None] | None = None) -> Result:
        for worker in self._workers:
            self._report(worker)
        for number, request in enumerate(self._trace):
            arrival = request.at * self._scale
            self._advance(arrival)
            self.now = arrival
            self._arrive(number, request)
            if progress is not None and number % 500 == 0:
                progress(f"{self._policy}: {number} of {len(self._trace)} requests")
        self._advance(inf)
        workers = self._workers
        return Result(
            sum(worker.hit_blocks for worker in workers),
            self._ttft,
            [worker.busy_s for worker in workers],
            [worker.requests for worker in workers],
        )

    def _advance(self, until: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, act, args = heappop(heap)
            act(*args)

    def _later(self, when: float, act: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heappush(self._heap, (when, self._count, act, args))

    # Requests.

    def _arrive(self, number: int, request: Request) -> None:
        frontend = self._rng.randrange(len(self._routers)) if len(self._routers) > 1 else 0
        router = self._routers[frontend]
        decision = router.choose(Ask(request.tokens, request.blocks, BLOCK), self._targets[frontend], self.now)
        assert decision is not None
        router.sent(number, decision, self.now)
        worker = self._workers[self._number[decision.target.worker]]
        self._later(self.now + TRANSIT_S, self._reach, worker, Job(number, request, decision.uncached, frontend))

    def _reach(self, worker: Worker, job: Job) -> None:
        worker.enqueue(job, self.now)
        if worker.current is None:
            self._later(worker.begin(self.now), self._computed, worker)
        if not worker.reporting:
            worker.reporting = True
            self._later(self.now + LOAD_EVENT_S, self._tick, worker)
        if not worker.telling:
            worker.telling = True
            self._later(self.now + LOAD_SOON_S, self._tell, worker)

    def _computed(self, worker: Worker) -> None:
        job, stored, evicted = worker.computed()
        arrived = self._trace[job.number].at * self._scale
        self._ttft[job.number] = self.now + TRANSIT_S - arrived
        self._publish(worker, stored, evicted)
        self._later(self.now + TRANSIT_S, self._routers[job.frontend].first_token, job.number, self.now + TRANSIT_S)
        self._later(self.now + ITL_S * (job.request.output - 1), self._ended, worker, job)
        if worker.queue:
            self._later(worker.begin(self.now), self._computed, worker)

    def _ended(self, worker: Worker, job: Job) -> None:
        self._publish(worker, [], worker.ended(job))
        self._later(self.now + TRANSIT_S, self._finished, job)

    def _finished(self, job: Job) -> None:
        self._routers[job.frontend].finished(job.number, self.now, job.request.output)

    # What workers tell.

    def _publish(self, worker: Worker, stored: list[int], evicted: list[int]) -> None:
        if stored or evicted:
            slot = self._slots[self._number[worker.id]]
            self._later(self.now + TRANSIT_S, self._apply, slot, stored, evicted)

    def _apply(self, slot: int, stored: list[int], evicted: list[int]) -> None:
        if stored:
            self._index.store(slot, DEVICE, array("Q", stored))
        if evicted:
            self._index.remove(slot, DEVICE, array("Q", evicted))

    def _tell(self, worker: Worker) -> None:
        """Of prompts that have just come."""
        worker.telling = False
        self._report(worker)

    def _tick(self, worker: Worker) -> None:
        """Reports come while there is something to tell; the last one says that the worker is idle."""
        self._report(worker)
        if worker.idle:
            worker.reporting = False
        else:
            self._later(self.now + LOAD_EVENT_S, self._tick, worker)

    def _report(self, worker: Worker) -> None:
        number, load = self._number[worker.id], worker.load(self.now)
        for targets in self._targets:
            self._later(self.now + TRANSIT_S, targets[number].report, load, self.now + TRANSIT_S)


def optimum(trace: Sequence[Request]) -> int:
    """Hit blocks of one infinite cache that all workers share and that holds a prompt from its arrival."""
    seen: set[int] = set()
    hits = 0
    for request in trace:
        for block in request.blocks:
            if block not in seen:
                break
            hits += 1
        seen.update(request.blocks)
    return hits


def round_robin_busy_s(trace: Sequence[Request], setting: Setting) -> float:
    """Seconds of prefill, over all workers, if requests go to them in turn."""
    workers = [Worker(number, tps, setting.cache) for number, tps in enumerate(setting.tps)]
    for number, request in enumerate(trace):
        worker = workers[number % len(workers)]
        worker.enqueue(Job(number, request, 0, 0), 0.0)
        worker.begin(0.0)
        job, _, _ = worker.computed()
        worker.ended(job)
    return sum(worker.busy_s for worker in workers)


def scale_of(trace: Sequence[Request], setting: Setting) -> float:
    """By what to multiply the trace's time. Raises TraceError if its time has no extent."""
    span = trace[-1].at - trace[0].at
    if span <= 0:
        raise TraceError("all requests of the trace have one timestamp, so no scale of time gives a utilisation")
    return round_robin_busy_s(trace, setting) / (len(setting.tps) * setting.utilization) / span


def run(
    trace: Sequence[Request], policies: Sequence[str], setting: Setting, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Replay ``trace`` with each policy. Raises TraceError, and KeyError for a policy that does not exist."""
    if setting.spread_s:
        trace = spread(trace, setting.spread_s, random.Random(setting.seed))
    scale = scale_of(trace, setting)
    best = optimum(trace)
    rows = []
    for policy in policies:
        result = Replay(trace, scale, policy, setting).run(progress)
        rows.append({"policy": policy, **_row(result, best)})
    return {
        "requests": len(trace),
        "blocks": sum(len(request.blocks) for request in trace),
        "distinct_blocks": len({block for request in trace for block in request.blocks}),
        "workers": len(setting.tps),
        "cache_blocks": None if setting.cache == inf else int(setting.cache),
        "prefill_tps": setting.tps[0],
        "itl_ms": ITL_S * 1e3,
        "block_tokens": BLOCK,
        "utilization": setting.utilization,
        "time_scale": round(scale, 4),
        "duration_s": round((trace[-1].at - trace[0].at) * scale, 1),
        "frontends": setting.frontends,
        "seed": setting.seed,
        "spread_s": setting.spread_s,
        "policies": rows,
    }


def _row(result: Result, best: int) -> dict[str, Any]:
    ordered = sorted(result.ttft)

    def percentile(share: float) -> float:
        return round(1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

    return {
        "hit_blocks": result.hit_blocks,
        "optimum_blocks": best,
        "hit_ratio": round(result.hit_blocks / best, 4) if best else 1.0,
        "ttft_p50_ms": percentile(0.5),
        "ttft_p90_ms": percentile(0.9),
        "ttft_p99_ms": percentile(0.99),
        "imbalance": round(result.imbalance, 4),
    }


def render(report: dict[str, Any]) -> str:
    """The report as a table."""
    cache = "unbounded" if report["cache_blocks"] is None else f"{report['cache_blocks']} blocks"
    lines = [
        f"{report['requests']} requests, {report['blocks']} blocks of {report['block_tokens']} tokens "
        f"({report['distinct_blocks']} distinct) in {report['duration_s']} s (trace time x {report['time_scale']})",
        f"{report['workers']} workers, {cache} each, prefill {report['prefill_tps']:g} tokens/s and serial, "
        f"ITL {report['itl_ms']:g} ms, round-robin's utilisation {report['utilization']:g}, "
        f"{report['frontends']} frontend(s), seed {report['seed']}"
        + (f", each timestamp spread over {report['spread_s']:g} s" if report["spread_s"] else ""),
        "",
        f"{'policy':<14}{'hit blocks':>11}{'of optimum':>11}{'TTFT p50':>12}{'p90':>12}{'p99':>12}{'imbalance':>11}",
    ]
    for row in report["policies"]:
        times = "".join(f"{row[f'ttft_{name}_ms'] / 1e3:>10.3f} s" for name in ("p50", "p90", "p99"))
        lines.append(
            f"{row['policy']:<14}{row['hit_blocks']:>11}{row['hit_ratio']:>11.1%}{times}{row['imbalance']:>11.3f}"
        )
    return "\n".join(lines)


def show(text: str) -> None:
    """Progress, for a person who watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
