"""When every target has too much to do: who waits in the frontend, in what order, and who is told to come back.

A request that waits here can still be ordered by priority, shared out between clients, cancelled for nothing and sent
to whichever target is free first; one that waits in an engine can not.  So targets are not filled beyond
:class:`Limits`, which lie far above what keeps an engine busy until the next load report.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil

from p2pdyn.core.request import Failure, Rejected
from p2pdyn.core.router_target import Target

MAX_QUEUED = 1024
"""Requests waiting in a frontend for one model; one more is answered 429."""
WAIT_S = 60.0
"""Longest wait; few clients have more patience, and most of theirs is needed for the answer."""
MAX_RETRY_S = 60
KEEP = 0.9
"""Weight of the past in the mean time between two admissions."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a target is saturated. Infinities and huge counts turn a limit off."""

    prefill_s: float = 30.0
    """Seconds of prefill queued: whoever comes now waits longer than that for a first token."""
    queued: int = 128
    """Requests that wait in the engine for a place in its batch: many steps' supply."""
    kv_used: float = 0.95
    kv_queued: int = 8
    """With this share of the KV cache held and this many requests waiting, one more only makes it preempt."""


DEFAULT_LIMITS = Limits()


def saturation(target: Target, queue_s: float, limits: Limits) -> str:
    """Why ``target`` should get no more now, or the empty string. ``queue_s`` is its queued prefill, in seconds."""
    load = target.load
    if queue_s > limits.prefill_s:
        return f"{queue_s:.1f} s of prefill queued (limit {limits.prefill_s:g})"
    if load.queued >= limits.kv_queued:
        if load.queued >= limits.queued:
            return f"{load.queued} requests wait in its engine (limit {limits.queued})"
        if load.kv_total and load.kv_used >= limits.kv_used * load.kv_total:
            return f"{load.kv_used} of {load.kv_total} KV blocks held and {load.queued} requests wait"
    return ""


def doubtful(targets: Sequence[Target], queues: Sequence[float], limits: Limits) -> bool:
    """Whether any of ``targets`` may be saturated: False, at little cost, on almost every request."""
    return max(queues, default=0.0) > limits.prefill_s or max(
        [target.load.queued for target in targets], default=0
    ) >= min(limits.kv_queued, limits.queued)


@dataclass(slots=True)
class _Waiting:
    key: Hashable
    priority: int
    since: float


class Admission:
    """The queue of one model at one frontend.

    Order: priority (as in vLLM, the lower value first), then turns between clients, then arrival.  Turns are start-time
    fair queueing with every request of equal weight: a client's n-th waiting request stands behind the (n-1)-th ones
    of all others.  Pure; ``now`` in seconds never goes back.  The caller asks :meth:`next` whenever a target may have
    room: after load reports, first tokens and ends.
    """

    def __init__(self, limit: int = MAX_QUEUED, wait_s: float = WAIT_S) -> None:
        self._limit = limit
        self._wait_s = wait_s
        self._waiting: dict[Hashable, _Waiting] = {}
        """In order of arrival."""
        self._order: list[tuple[int, int, int, Hashable]] = []
        self._turns: dict[str, int] = {}
        """Client -> turn of its last waiting request."""
        self._turn = 0
        self._arrivals = 0
        self._gap_s = 0.0
        self._last: float | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, key: Hashable, now: float, priority: int = 0, client: str = "", clear_s: float = 0.0) -> None:
        """Put a request into the queue. Raises Rejected (429) if it is full; ``clear_s`` is the estimate of the
        seconds until a target has room again, for Retry-After."""
        if len(self._waiting) >= self._limit:
            retry = self.retry_after(clear_s)
            message = f"All workers are saturated and {len(self._waiting)} requests wait; retry in {retry} s."
            raise Rejected(Failure(429, "overloaded", message, retry))
        turn = max(self._turn, self._turns.get(client, -1) + 1)
        self._turns[client] = turn
        self._arrivals += 1
        self._waiting[key] = _Waiting(key, priority, now)
        heappush(self._order, (priority, turn, self._arrivals, key))

    def next(self, now: float) -> Hashable | None:
        """Take out whose turn it is; None if nobody waits."""
        while self._order:
            _, turn, _, key = heappop(self._order)
            if self._waiting.get(key) is None:
                continue
            del self._waiting[key]
            self._turn = max(self._turn, turn)
            self._admitted(now)
            return key
        return None

    def cancel(self, key: Hashable) -> bool:
        """The client left. False if it does not wait."""
        if self._waiting.pop(key, None) is None:
            return False
        self._tidy()
        return True

    def overdue(self, now: float) -> list[tuple[Hashable, Failure]]:
        """Take out those that have waited too long, with what to tell them."""
        late = []
        for one in self._waiting.values():
            if now - one.since < self._wait_s:
                break
            late.append(one.key)
        for key in late:
            del self._waiting[key]
        self._tidy()
        retry = self.retry_after()
        message = f"All workers have been saturated for {self._wait_s:g} s; retry in {retry} s."
        return [(key, Failure(429, "overloaded", message, retry)) for key in late]

    def retry_after(self, clear_s: float = 0.0) -> int:
        """Whole seconds until the queue as it is will have been served: its length times the mean time between two
        admissions, but not before ``clear_s``."""
        return min(MAX_RETRY_S, max(1, ceil(max(clear_s, len(self._waiting) * self._gap_s))))

    def next_deadline(self) -> float | None:
        """When :meth:`overdue` has something to say."""
        for one in self._waiting.values():
            return one.since + self._wait_s
        return None

    def _admitted(self, now: float) -> None:
        """Time between admissions counts only while somebody waits for one."""
        if self._last is not None:
            gap = now - self._last
            self._gap_s = KEEP * self._gap_s + (1 - KEEP) * gap if self._gap_s else gap
        self._last = now if self._waiting else None
        self._tidy()

    def _tidy(self) -> None:
        if not self._waiting:
            self._order.clear()
            self._turns.clear()
            self._turn = 0
            self._last = None
        elif len(self._order) > 2 * len(self._waiting) + 64:
            self._order = [entry for entry in self._order if entry[3] in self._waiting]
            heapify(self._order)
