"""What targets will hold soon: a routed prompt counts as held by its target before any KV event says so.

So siblings of a burst follow the first of them.  A sequence hash names its whole prefix, so a prediction is the hashes
of the prompt's tail, from ``start`` on, of which the target held nothing yet, and nothing is written down per block:
whether another prompt reaches into the tail is one comparison at ``start``, and how far is a bisection.

A prediction stays while its request has no first token (a burst may queue for seconds) and :data:`TTL_S` longer, by
when the events have come.  For targets whose engine tells no events it is all there is, and lives
:data:`APPROXIMATE_TTL_S` from its last use.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush

from p2pdyn.core.router_target import Target

TTL_S = 2.0
"""After the first token: events come once an engine step, and a lost one is noticed by the next digest or two."""
PENDING_S = 60.0
"""At most this long without a first token."""
APPROXIMATE_TTL_S = 120.0
"""Dynamo's, for the same guess."""
MAX_BLOCKS = 2**20
"""In all tails together, 8 MB. The oldest go first."""


class _Prediction:
    __slots__ = ("expires", "parent", "start", "tail", "target")

    def __init__(self, target: Target, start: int, tail: array[int], expires: float, parent: Hashable | None) -> None:
        self.target = target
        self.start = start
        self.tail = tail
        self.expires = expires
        self.parent = parent
        """The request by which the target is believed to hold what comes before the tail."""

    def reach(self, hashes: Sequence[int]) -> int:
        """How many leading blocks of ``hashes``, known to agree at ``start``, the target will hold."""
        start, tail = self.start, self.tail
        low, high = 1, min(len(hashes) - start, len(tail))
        if tail[high - 1] == hashes[start + high - 1]:
            return start + high
        while low < high:
            middle = (low + high) // 2
            if tail[middle] == hashes[start + middle]:
                low = middle + 1
            else:
                high = middle
        return start + low


class Predictions:
    """Keys are requests. ``now`` never goes back."""

    def __init__(self, ttl: float = TTL_S, approximate_ttl: float = APPROXIMATE_TTL_S, limit: int = MAX_BLOCKS) -> None:
        self._ttl = ttl
        self._approximate_ttl = approximate_ttl
        self._limit = limit
        self.blocks = 0
        self._by_key: dict[Hashable, _Prediction] = {}
        self._by_start: dict[int, dict[int, list[tuple[Hashable, _Prediction]]]] = {}
        """start -> hash at start -> predictions: at most a few, since who shares more than that starts further on."""
        self._due: list[tuple[float, int, Hashable]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def match(self, hashes: Sequence[int], now: float) -> dict[Target, int]:
        """How many leading blocks of the prompt each target will hold; targets without a prediction are left out."""
        if self._due and self._due[0][0] <= now:
            self.expire(now)
        found: dict[Target, int] = {}
        count = len(hashes)
        for start, filed in self._by_start.items():
            if start < count and (there := filed.get(hashes[start])):
                for _, one in there:
                    reach = one.reach(hashes)
                    if reach > found.get(one.target, 0):
                        found[one.target] = reach
        return found

    def add(self, key: Hashable, target: Target, hashes: Sequence[int], start: int, now: float) -> None:
        """Request ``key`` goes to ``target``, which is known or believed to hold ``start`` blocks of the prompt."""
        self._remove(key)
        parent = None
        if target.approximate:
            parent = self._source(target, hashes)
            self._touch(parent, now)
        if start >= len(hashes):
            return
        life = self._approximate_ttl if target.approximate else PENDING_S
        one = _Prediction(target, start, array("Q", hashes[start:]), now + life, parent)
        self._by_key[key] = one
        self._by_start.setdefault(start, {}).setdefault(hashes[start], []).append((key, one))
        self.blocks += len(one.tail)
        self._schedule(key, one.expires)
        while self.blocks > self._limit:
            self._remove(next(iter(self._by_key)))

    def settled(self, key: Hashable, now: float) -> None:
        """The request's prompt has been computed: the events are on their way."""
        one = self._by_key.get(key)
        if one is not None and not one.target.approximate and one.expires > now + self._ttl:
            one.expires = now + self._ttl
            self._schedule(key, one.expires)

    def failed(self, key: Hashable) -> None:
        """The request was refused, or its prompt was never computed."""
        self._remove(key)

    def forget(self, target: Target) -> None:
        """The target is gone, or its cache was cleared."""
        for key in [key for key, one in self._by_key.items() if one.target is target]:
            self._remove(key)

    def expire(self, now: float) -> None:
        """Let go of what is due."""
        due = self._due
        while due and due[0][0] <= now:
            key = heappop(due)[2]
            one = self._by_key.get(key)
            if one is None:
                continue
            if one.expires <= now:
                self._remove(key)
            else:
                self._schedule(key, one.expires)

    def _schedule(self, key: Hashable, when: float) -> None:
        self._count += 1
        heappush(self._due, (when, self._count, key))
        if len(self._due) > 4 * len(self._by_key) + 256:  # most have settled long before they were due
            self._due[:] = [(one.expires, -number, key) for number, (key, one) in enumerate(self._by_key.items())]
            heapify(self._due)

    def _remove(self, key: Hashable) -> None:
        one = self._by_key.pop(key, None)
        if one is None:
            return
        self.blocks -= len(one.tail)
        filed = self._by_start[one.start]
        same = filed[one.tail[0]]
        same.remove((key, one))
        if not same:
            del filed[one.tail[0]]
            if not filed:
                del self._by_start[one.start]

    def _source(self, target: Target, hashes: Sequence[int]) -> Hashable | None:
        """The request by which ``target`` is believed to hold most of the prompt."""
        best, most = None, 0
        for start, filed in self._by_start.items():
            if start < len(hashes):
                for key, one in filed.get(hashes[start], ()):
                    if one.target is target and (reach := one.reach(hashes)) > most:
                        best, most = key, reach
        return best

    def _touch(self, key: Hashable | None, now: float) -> None:
        """A cache keeps what was used last: what the prompt was found by lives on, and what that was found by."""
        while key is not None and (one := self._by_key.get(key)) is not None:
            one.expires = max(one.expires, now + self._approximate_ttl)
            key = one.parent
