"""One routing target, a (worker, dp_rank), as one frontend sees it: what it has to do, how fast it is.

Two sources are joined, so that several frontends do not herd onto one worker between two reports: the worker's load
reports (exact, for all frontends, up to a quarter of a second old) and what this frontend has sent and seen since.

Prefill is one server working through a queue, so the estimate is a fluid queue: the tokens that the last report gave,
drained at the measured speed since, plus what this frontend sent after it.  A report says nothing of requests that were
under way when it was made: what was sent less than :data:`IN_FLIGHT_S` before it came is added to it, all else of ours
is in it already.  docs/design/routing.md states the error.

Requests and decode blocks are counts: ours are known; others' are what a report shows beyond ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from math import exp

from p2pdyn.core.types import Load, NodeId

IN_FLIGHT_S = 0.01
"""One way to the worker and through its loop; its report one way back."""

RECENT_S = 60.0
"""Memory of the work sent to a target."""

STALE_S = 1.0
"""Four reports missed: the drain is no longer believed, all that we have outstanding there is."""

DEFAULT_TPS = 5000.0
"""Prefill tokens a second where nobody has measured any yet: what it is hardly matters, that it is one for all does."""


@dataclass(slots=True)
class _Open:
    uncached: int
    blocks: int


class Target:
    """``slot`` is its bit in the KV index, -1 if it has none. ``approximate``: its engine tells no KV events, so what
    it holds is guessed from what was sent to it. ``now`` never goes back."""

    __slots__ = (
        "_as_of", "_open", "_recent", "_reported", "_tokens", "_work", "_worked", "approximate", "assumed_tps", "load",
        "my_blocks", "my_pending", "others", "others_blocks", "rank", "slot", "worker",
    )  # fmt: skip

    def __init__(self, worker: NodeId, rank: int = 0, slot: int = -1, approximate: bool = False) -> None:
        self.worker = worker
        self.rank = rank
        self.slot = slot
        self.approximate = approximate
        self.load = Load()
        self.assumed_tps = DEFAULT_TPS
        """Stands in while the worker publishes no speed; the router keeps it at the median of the others."""
        self.my_pending = 0
        """Uncached prompt tokens of our requests there that have no first token yet."""
        self.my_blocks = 0
        """Blocks of our open requests there."""
        self.others = 0
        self.others_blocks = 0
        self._open: dict[Hashable, _Open] = {}
        self._recent: deque[tuple[float, Hashable]] = deque()
        self._work = 0.0
        self._worked = 0.0
        self._tokens = 0.0
        self._as_of = 0.0
        self._reported: float | None = None

    # What happens.

    def report(self, load: Load, now: float) -> None:
        """Take over a load report, just received."""
        self.load = load
        tokens, requests, blocks = load.prefill_tokens_queued, len(self._open), self.my_blocks
        recent = self._recent
        while recent and recent[0][0] <= now - IN_FLIGHT_S:
            recent.popleft()
        for _, key in recent:
            flying = self._open.get(key)
            if flying is not None:
                tokens += flying.uncached
                blocks -= flying.blocks
                requests -= 1
        self._tokens = float(tokens)
        self._as_of = self._reported = now
        self.others = max(0, load.active_requests + load.queued - requests)
        self.others_blocks = max(0, load.active_blocks - blocks)

    def sent(self, key: Hashable, uncached: int, blocks: int, now: float) -> None:
        """This frontend sent it a request: ``uncached`` prompt tokens to compute, ``blocks`` KV blocks to hold."""
        self._work = self._work * exp((self._worked - now) / RECENT_S) + uncached
        self._worked = now
        self._tokens = self._left(now) + uncached
        self._as_of = now
        self._open[key] = _Open(uncached, blocks)
        self.my_pending += uncached
        self.my_blocks += blocks
        recent = self._recent
        while recent and recent[0][0] <= now - IN_FLIGHT_S:
            recent.popleft()
        recent.append((now, key))

    def first_token(self, key: Hashable) -> None:
        """Its prompt has been computed."""
        one = self._open.get(key)
        if one is not None:
            self.my_pending -= one.uncached
            one.uncached = 0

    def finished(self, key: Hashable, now: float) -> None:
        """It has ended there, in whatever way; what was not computed of a prompt that never had its token is not
        going to be."""
        one = self._open.pop(key, None)
        if one is None:
            return
        self.my_pending -= one.uncached
        self.my_blocks -= one.blocks
        if one.uncached:
            self._tokens = max(0.0, self._left(now) - one.uncached)
            self._as_of = now

    # What is believed.

    @property
    def tps(self) -> float:
        """Prefill tokens a second; never 0."""
        return self.load.prefill_tps or self.assumed_tps

    def _left(self, now: float) -> float:
        left = self._tokens - (now - self._as_of) * (self.load.prefill_tps or self.assumed_tps)
        return left if left > 0.0 else 0.0

    def prefill_tokens(self, now: float) -> float:
        """Prompt tokens still to compute there, of all frontends."""
        left = self._left(now)
        if self._reported is None or now - self._reported > STALE_S:
            return max(left, float(self.my_pending))
        return left

    def queue_s(self, now: float) -> float:
        """Seconds until a prompt sent now is begun with."""
        return self.prefill_tokens(now) / (self.load.prefill_tps or self.assumed_tps)

    def recent_s(self, now: float) -> float:
        """Seconds of prefill that we sent it, decayed with :data:`RECENT_S`."""
        return self._work * exp((self._worked - now) / RECENT_S) / (self.load.prefill_tps or self.assumed_tps)

    @property
    def mine(self) -> int:
        """Open requests of this frontend there."""
        return len(self._open)

    @property
    def requests(self) -> int:
        """Open requests there, of all frontends."""
        return len(self._open) + self.others

    @property
    def decode_blocks(self) -> int:
        """KV blocks that requests there hold, or will when their turn comes."""
        return self.my_blocks + self.others_blocks

    def __repr__(self) -> str:
        return f"Target({self.worker}, rank={self.rank}, slot={self.slot})"
