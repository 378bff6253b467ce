"""One routing target, a (worker, dp_rank), as one frontend sees it: what it has to do, how fast it is.

Two sources are joined, so that several frontends do not herd onto one worker between two reports: the worker's load
reports (exact, for all frontends, up to a quarter of a second old) and what this frontend has sent and seen since.

Prefill is one server working through a queue, so the estimate is a fluid queue: the tokens that the last report gave,
drained at the measured speed since, plus what this frontend sent after it.  A report says nothing of requests that were
under way when it was made: what was sent less than :data:`IN_FLIGHT_S` before it came is added to it, all else of ours
is in it already.  docs/design/routing.md states the error.

Requests and decode blocks are counts: ours are known; others' are what a report shows beyond ours.  With as many
requests as its engine runs at a time, the next one waits until one ends, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from math import exp

from p2pdyn.constants import WORK_MEMORY_S
from p2pdyn.core.types import AGGREGATED, Load, NodeId

IN_FLIGHT_S = 0.004
"""One way to the worker and through its loop; its report one way back. Less than LOAD_SOON_S, in which the worker
tells of a prompt, so that none is counted twice; one that is longer on its way is missed only until that report."""

SPEED_MEMORY_S = 60.0
"""After this long without a prompt timed there, a third is left of how much slower than others it was found."""

STALE_S = 1.0
"""Four reports missed: the drain is no longer believed, all that we have outstanding there is."""

LATE_S = 0.25
"""Some steps, and the way there and back: so much later than thought a first token says nothing."""

DEFAULT_TPS = 5000.0
"""Prefill tokens a second where nobody has measured any yet: what it is hardly matters, that it is one for all does."""


@dataclass(slots=True)
class _Open:
    uncached: int
    blocks: int


class Target:
    """``slot`` is its bit in the KV index, -1 if it has none. ``approximate``: its engine tells no KV events, so what
    it holds is guessed from what was sent to it. ``role`` and ``moves_kv`` are as its worker gossips them. ``now``
    never goes back."""

    __slots__ = (
        "_as_of", "_assumed_tps", "_due", "_guessed", "_open", "_recent", "_reported", "_timed", "_tokens", "_worked",
        "approximate",
        "behind", "block_pull_s", "decode_blocks", "itl_per_block_s", "load", "moves_kv", "my_blocks", "my_pending",
        "others", "others_blocks", "promised", "promised_blocks", "rank", "requests", "role", "slot", "token_s", "tps",
        "waits", "work", "worker",
    )  # fmt: skip

    def __init__(
        self,
        worker: NodeId,
        rank: int = 0,
        slot: int = -1,
        approximate: bool = False,
        role: str = AGGREGATED,
        moves_kv: str = "",
    ) -> None:
        self.role = role
        self.moves_kv = moves_kv
        self.worker = worker
        self.rank = rank
        self.slot = slot
        self.approximate = approximate
        self.load = Load()
        # A decision looks at each target, so what it looks at is plain attributes, made new with each event.
        self.tps = self._assumed_tps = DEFAULT_TPS
        """Prefill tokens a second; never 0."""
        self.itl_per_block_s = 0.0
        self.block_pull_s = 0.0
        """Seconds in which it reads a KV block from another worker; 0: not measured, or it cannot."""
        self.waits = False
        """Prefill may be queued there, or its batch is full: :meth:`wait_s` is asked. Otherwise it is 0."""
        self.behind = 0
        """Requests that have to end before one sent now has a place in its batch."""
        self.token_s = 0.0
        """Seconds from one token to the next, over all places of its batch; 0: not measured, or the batch not known."""
        self.requests = 0
        """Open requests there, of all frontends."""
        self.decode_blocks = 0
        """KV blocks that requests there hold, or will when their turn comes."""
        self.work = 0.0
        """Seconds of prefill that all frontends sent it, those of long ago for little: see :meth:`recent_s`. Counted at
        the speed of then: a minute's work would double and halve with each measured speed."""
        self.my_pending = 0
        """Uncached prompt tokens of our requests there that have no first token yet."""
        self.my_blocks = 0
        """Blocks of our open requests there."""
        self.promised = 0
        """Of our requests those that are still computed elsewhere, and will come."""
        self.promised_blocks = 0
        self.others = 0
        self.others_blocks = 0
        self._open: dict[Hashable, _Open] = {}
        self._due: dict[Hashable, float] = {}
        """Of our requests there that have no first token yet, oldest first: when it was thought to come."""
        self._recent: deque[tuple[float, Hashable]] = deque()
        self._worked = 0.0
        self._guessed = True
        self._tokens = 0.0
        self._as_of = self._timed = 0.0
        self._reported: float | None = None

    # What happens.

    def report(self, load: Load, now: float) -> None:
        """Take over a load report, just received."""
        if load.prefill_tokens_queued or load.prefill_tps != self.load.prefill_tps:
            self._timed = now
        self.load = load
        self._believe(now)
        self.itl_per_block_s = load.itl_per_block_ms * 1e-3
        self.block_pull_s = load.block_bytes / load.pull_bps if load.pull_bps else 0.0
        self.token_s = load.itl_ms * 1e-3 / load.slots if load.slots else 0.0
        tokens, requests = load.prefill_tokens_queued, len(self._open) - self.promised
        blocks = self.my_blocks - self.promised_blocks
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
        if load.work_s:
            self.work, self._worked = load.work_s + (tokens - load.prefill_tokens_queued) / self.tps, now
        self.waits = tokens > 0 or self.my_pending > 0
        self.others = max(0, load.active_requests + load.queued - requests)
        self.others_blocks = max(0, load.active_blocks - blocks)
        self._count()

    def assume(self, tps: float, now: float) -> None:
        """Its speed while the worker publishes none, and more and more while no prompt is timed there: the median of
        the others'."""
        self._assumed_tps = tps
        self._believe(now)

    def _believe(self, now: float) -> None:
        """A worker that is thought slow gets few prompts, so that what made it seem so must be forgotten in time."""
        measured, assumed, before = self.load.prefill_tps, self._assumed_tps, self.tps
        if not measured:
            self.tps = assumed
        elif measured >= assumed:
            self.tps = measured
        else:
            self.tps = assumed + (measured - assumed) * exp((self._timed - now) / SPEED_MEMORY_S)
        if self._guessed:  # work was counted at a speed that nobody had measured
            self.work *= before / self.tps
            self._guessed = not measured

    def sent(self, key: Hashable, uncached: int, blocks: int, now: float) -> None:
        """This frontend sent it a request: ``uncached`` prompt tokens to compute, ``blocks`` KV blocks to hold."""
        self.work = self.work * exp((self._worked - now) / WORK_MEMORY_S) + uncached / self.tps
        self._worked = now
        self._tokens = self._left(now) + uncached
        self._as_of = now
        self._open[key] = _Open(uncached, blocks)
        self._timed = now
        self.my_pending += uncached
        if uncached:
            self._due[key] = now + self._tokens / self.tps
        self.my_blocks += blocks
        self.waits = True
        self._count()
        recent = self._recent
        while recent and recent[0][0] <= now - IN_FLIGHT_S:
            recent.popleft()
        recent.append((now, key))

    def promise(self, key: Hashable, blocks: int) -> None:
        """A request of ours will come once another worker has computed its prompt; until then no report shows it."""
        self._open[key] = _Open(0, blocks)
        self.promised += 1
        self.promised_blocks += blocks
        self.my_blocks += blocks
        self._count()

    def withdraw(self, key: Hashable) -> None:
        """It is to come now, or never."""
        blocks = self._open.pop(key).blocks
        self.promised -= 1
        self.promised_blocks -= blocks
        self.my_blocks -= blocks
        self._count()

    def first_token(self, key: Hashable) -> None:
        """Its prompt has been computed."""
        one = self._open.get(key)
        if one is not None:
            self.my_pending -= one.uncached
            self._due.pop(key, None)
            one.uncached = 0

    def finished(self, key: Hashable, now: float) -> None:
        """It has ended there, in whatever way; what was not computed of a prompt that never had its token is not
        going to be."""
        one = self._open.pop(key, None)
        if one is None:
            return
        self.my_pending -= one.uncached
        self._due.pop(key, None)
        self.my_blocks -= one.blocks
        self._count()
        if one.uncached:
            self._tokens = max(0.0, self._left(now) - one.uncached)
            self._as_of = now

    def _count(self) -> None:
        self.requests = len(self._open) + self.others
        self.decode_blocks = self.my_blocks + self.others_blocks
        slots = self.load.slots
        if slots and self.requests >= slots:
            self.behind = self.requests + 1 - slots
            self.waits = True
        else:
            self.behind = 0

    # What is believed.

    def _left(self, now: float) -> float:
        left = self._tokens - (now - self._as_of) * self.tps
        return left if left > 0.0 else 0.0

    def prefill_tokens(self, now: float) -> float:
        """Prompt tokens still to compute there, of all frontends."""
        left = self._left(now)
        if self._reported is None or now - self._reported > STALE_S:
            return max(left, float(self.my_pending))
        return left

    @property
    def unstarted(self) -> int:
        """Our requests there that have no first token yet."""
        return len(self._due)

    def late_s(self, now: float) -> float:
        """For how long a first token has been overdue: what holds it up, a KV cache that is full as a rule, holds up
        whatever is sent now. No report tells how long that takes, so the wait itself is the measure."""
        for due in self._due.values():
            return max(0.0, now - due - LATE_S)
        return 0.0

    def queue_s(self, now: float) -> float:
        """Seconds until a prompt sent now is begun with."""
        if not self.waits:
            return 0.0
        tokens = self.prefill_tokens(now)
        if not (tokens or self.my_pending or self.behind):
            self.waits = False  # until something is sent or reported
            self._tokens = 0.0
        return tokens / self.tps

    def wait_s(self, now: float, output: float) -> float:
        """Seconds until a prompt sent now is begun with, and has a place: places become free one after the other, each
        after ``output`` tokens."""
        return self.queue_s(now) + max(self.late_s(now), self.behind * output * self.token_s)

    def recent_s(self, now: float) -> float:
        """Seconds of prefill that it was sent, decayed with WORK_MEMORY_S."""
        return self.work * exp((self._worked - now) / WORK_MEMORY_S)

    @property
    def mine(self) -> int:
        """Open requests of this frontend there."""
        return len(self._open)

    def __repr__(self) -> str:
        return f"Target({self.worker}, rank={self.rank}, slot={self.slot})"
