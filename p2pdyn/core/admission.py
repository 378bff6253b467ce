"""When every target has too much to do: who waits in the frontend, in what order, and who is told to come back.

A request that waits here can still be ordered by priority, shared out between clients, cancelled for nothing and sent
to whichever target is free first; one that waits in an engine can not.  So a model whose targets all have a supply
(:func:`supplied`) gets the next request when one of them has begun with an earlier one, and no single target is filled
beyond :class:`Limits` while another is left.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil, exp

from p2pdyn.core.request import Failure, Rejected
from p2pdyn.core.router_target import Target
from p2pdyn.core.share import Share

MAX_QUEUED = 2048
"""Requests waiting in a frontend for one model; one more is answered 429."""
MAX_QUEUED_TOKENS = 16 * 2**20
"""Tokens of their prompts: 64 MB."""
WAIT_S = 60.0
"""Longest wait; few clients have more patience, and most of theirs is needed for the answer."""
MAX_RETRY_S = 60
QUEUE_S = 3.0
"""What may wait is what is served in this time, at the rate measured: a longer queue only outlasts the overload."""
MIN_QUEUED = 64
"""... but so many may, however slow the workers are: half of them for one client."""
MEASURED_S = 1.0
"""Nothing is known of the rate before."""
FEW = 2
"""Admissions that say nothing of a rate."""
DRAIN_S = 10.0
"""Memory of the rate at which a queue is served."""
SUPPLY = 32
"""Requests of ours without a first token that keep a target busy until it hears of the next: it is told within
milliseconds of a first token, and few engines begin with more prompts in a step."""
MIN_SUPPLY = 4
SUPPLY_S = 0.5
"""Seconds of queued prefill that do so too."""


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


def supplied(target: Target, queue_s: float, late_s: float) -> bool:
    """Whether ``target`` has enough to begin with until it hears of more; whoever is sent there now waits behind that.

    An engine whose batch is full, or its KV cache (requests wait in it, and a first token is overdue), needs only what
    takes the places that soon become free: a fourth of its batch. ``queue_s`` is its queued prefill, in seconds."""
    unstarted = target.unstarted
    if unstarted < MIN_SUPPLY:
        return unstarted > 1 and queue_s > SUPPLY_S
    load, enough = target.load, SUPPLY
    if target.behind or (load.queued and late_s):
        batch = load.slots if target.behind else load.active_requests
        enough = max(MIN_SUPPLY, min(SUPPLY, batch // 4))
    return unstarted >= enough or queue_s > SUPPLY_S


def doubtful(targets: Sequence[Target], queues: Sequence[float], limits: Limits) -> bool:
    """Whether any of ``targets`` may be saturated: False, at little cost, on almost every request."""
    return max(queues, default=0.0) > limits.prefill_s or max(
        [target.load.queued for target in targets], default=0
    ) >= min(limits.kv_queued, limits.queued)


@dataclass(slots=True)
class _Waiting:
    key: Hashable
    priority: int
    client: str
    cost: float
    tokens: int
    since: float


class _Turns:
    """Whose turn it is among the clients of one priority: start-time fair queueing (Goyal et al. 1996) over costs.

    A request's tag is where its client's last one ended, or the clock if that is later. The clock advances by what has
    been served divided by the number of clients that wait, as in generalised processor sharing: so a tag is reached
    after a bounded number of others, however many new clients come.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        """How many each client has; those that have none are not there."""
        self._clock = 0.0
        self._ends: dict[str, float] = {}

    def tag(self, client: str, cost: float) -> float:
        start = max(self._clock, self._ends.pop(client, 0.0))
        self._ends[client] = start + cost
        self.waiting[client] = self.waiting.get(client, 0) + 1
        if len(self._ends) > 2 * len(self.waiting) + 8:
            self._forget()
        return start

    def served(self, one: _Waiting) -> None:
        self._clock += one.cost / len(self.waiting)
        self._left(one.client)

    def gone(self, one: _Waiting) -> None:
        """It was not served: its client's next one need not stand behind it."""
        if one.client in self._ends:
            self._ends[one.client] -= one.cost
        self._left(one.client)

    def _left(self, client: str) -> None:
        self.waiting[client] -= 1
        if not self.waiting[client]:
            del self.waiting[client]

    def _forget(self) -> None:
        """Clients that wait no more and whose end has passed; of others the oldest, who come back no worse for it."""
        for client in [client for client, end in self._ends.items() if end <= self._clock]:
            del self._ends[client]
        away = [client for client in self._ends if client not in self.waiting]
        for client in away[: max(0, len(self._ends) - 2 * len(self.waiting) - 8)]:
            del self._ends[client]


class Admission:
    """The queue of one model at one frontend.

    Order: priority (as in vLLM, the lower value first), then turns between clients by the cost of their requests, then
    arrival.  A client may hold as many places as are free, and as many prompt tokens: a flood stops at half of the
    queue, and two at a third each, so that others find a place (:class:`~p2pdyn.core.share.Share`).  Pure; ``now`` in
    seconds never goes back.  The caller asks :meth:`next` whenever a target may have room: after load reports, first
    tokens and ends.
    """

    def __init__(self, limit: int = MAX_QUEUED, wait_s: float = WAIT_S, max_tokens: int = MAX_QUEUED_TOKENS) -> None:
        self._wait_s = wait_s
        self._limit = limit
        self._places = Share(limit)
        self._tokens = Share(max_tokens)
        self._waiting: dict[Hashable, _Waiting] = {}
        """In order of arrival."""
        self._order: list[tuple[int, float, int, Hashable]] = []
        self._turns: dict[int, _Turns] = {}
        """By priority."""
        self._arrivals = 0
        self._served = self._busy_s = 0.0
        """Requests admitted of late, and the time that it took, both decayed with DRAIN_S."""
        self._last: float | None = None
        """Up to when that is counted: only while somebody waits."""

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(
        self,
        key: Hashable,
        now: float,
        priority: int = 0,
        client: str = "",
        tokens: int = 1,
        cost: float = 1.0,
        clear_s: float = 0.0,
    ) -> None:
        """Put a request into the queue. Raises Rejected (429) if it is full, or its client's share is; ``clear_s`` is
        the estimate of the seconds until a target has room again, for Retry-After. ``tokens`` is its prompt's length,
        ``cost`` what it takes of a worker, in any one unit."""
        places, held = self._places, self._tokens
        places.limit = self._room(now, first=not places.of(client))
        if not (places.allows(client) and held.allows(client, tokens)):
            share = places.free > 0 and tokens <= held.free
            raise Rejected(self._full(places.of(client) if share else 0, now, clear_s))
        if not self._waiting:
            self._last = now
        turns = self._turns.get(priority)
        if turns is None:
            turns = self._turns[priority] = _Turns()
        self._arrivals += 1
        self._waiting[key] = _Waiting(key, priority, client, cost, tokens, now)
        places.take(client)
        held.take(client, tokens)
        heappush(self._order, (priority, turns.tag(client, cost), self._arrivals, key))

    def next(self, now: float) -> Hashable | None:
        """Take out whose turn it is; None if nobody waits."""
        while self._order:
            key = heappop(self._order)[3]
            one = self._waiting.get(key)
            if one is None:
                continue
            self._count(now)
            self._served += 1.0
            self._turns[one.priority].served(one)
            self._remove(one)
            return key
        return None

    def cancel(self, key: Hashable) -> bool:
        """The client left. False if it does not wait."""
        one = self._waiting.get(key)
        if one is None:
            return False
        self._turns[one.priority].gone(one)
        self._remove(one)
        return True

    def overdue(self, now: float) -> list[tuple[Hashable, Failure]]:
        """Take out those that have waited too long, with what to tell them."""
        late = []
        for one in self._waiting.values():
            if now - one.since < self._wait_s:
                break
            late.append(one)
        retry = self.retry_after(now)
        for one in late:
            self.cancel(one.key)
        message = f"All workers have been saturated for {self._wait_s:g} s; retry in {retry} s."
        return [(one.key, Failure(429, "overloaded", message, retry)) for one in late]

    def retry_after(self, now: float, clear_s: float = 0.0, ahead: int | None = None) -> int:
        """Whole seconds until the queue as it is, or ``ahead`` requests of it, will have been served, at the rate
        measured, but not before ``clear_s``."""
        queue_s = (len(self) if ahead is None else ahead) * self._each_s(now)
        if self._served < FEW:  # not known yet: as long again as it has taken so far
            queue_s = min(queue_s, self._each_s(now) * max(1.0, self._served))
        return min(MAX_RETRY_S, max(1, ceil(max(clear_s, queue_s))))

    def next_deadline(self) -> float | None:
        """When :meth:`overdue` has something to say."""
        for one in self._waiting.values():
            return one.since + self._wait_s
        return None

    def _full(self, held: int, now: float, clear_s: float) -> Failure:
        """``held``: what the client has waiting, if that is why; its own are served in turn with the others'."""
        if not held:
            retry = self.retry_after(now, clear_s)
            message = f"All workers are saturated and {len(self)} requests wait; retry in {retry} s."
        else:
            retry = self.retry_after(now, clear_s, min(len(self), held * len(self._places.held)))
            message = f"All workers are saturated and {held} of your requests wait already; retry in {retry} s."
        return Failure(429, "overloaded", message, retry)

    def _each_s(self, now: float) -> float:
        """Seconds between two admissions of late."""
        busy_s = self._busy_s + (now - self._last if self._last is not None else 0.0)
        return busy_s / max(1.0, self._served)

    def _room(self, now: float, first: bool) -> int:
        """How many may wait now; ``first``: for a client that has none waiting, which need not suffer for it when the
        queue has become too long for those that have."""
        each_s = self._each_s(now)
        if not each_s or self._busy_s < MEASURED_S:
            return self._limit
        return min(self._limit, max(MIN_QUEUED, int(QUEUE_S / each_s)) * (1 + first))

    def _count(self, now: float) -> None:
        if self._last is None:
            return
        elapsed, self._last = now - self._last, now
        keep = exp(-elapsed / DRAIN_S)
        self._served *= keep
        self._busy_s = self._busy_s * keep + elapsed

    def _remove(self, one: _Waiting) -> None:
        del self._waiting[one.key]
        self._places.give(one.client)
        self._tokens.give(one.client, one.tokens)
        if not self._turns[one.priority].waiting:
            del self._turns[one.priority]
        if not self._waiting:
            self._order.clear()
            self._last = None
        elif len(self._order) > 2 * len(self._waiting) + 64:
            self._order = [entry for entry in self._order if entry[3] in self._waiting]
            heapify(self._order)
