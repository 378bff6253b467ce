"""A simulated worker for `p2pdyn bench route`: a real prefix cache, serial prefill, decode at a fixed pace."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from math import exp, inf

from p2pdyn.constants import WORK_MEMORY_S
from p2pdyn.core.types import Load, NodeId
from p2pdyn.sim.route_trace import BLOCK, Request

ITL_S = 0.01


class PrefixCache:
    """Least recently used blocks leave first; those in use stay, even if that means more than ``capacity`` of them."""

    def __init__(self, capacity: float = inf) -> None:
        self.capacity = capacity
        self.used: dict[int, int] = {}
        """Block -> how many requests hold it."""
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.used) + len(self._idle)

    def hits(self, blocks: list[int]) -> int:
        """How many leading blocks are cached."""
        used, idle = self.used, self._idle
        for count, block in enumerate(blocks):
            if block not in used and block not in idle:
                return count
        return len(blocks)

    def hold(self, blocks: list[int]) -> tuple[list[int], list[int]]:
        """Hold ``blocks``, storing what is not cached: (newly stored, evicted)."""
        used, idle = self.used, self._idle
        stored = []
        for block in blocks:
            if block in used:
                used[block] += 1
                continue
            if block in idle:
                del idle[block]
            else:
                stored.append(block)
            used[block] = 1
        return stored, self._evict()

    def release(self, blocks: list[int]) -> list[int]:
        """Let go of ``blocks``, the last first, so that of a chain the end is evicted first: what is evicted."""
        used, idle = self.used, self._idle
        for block in reversed(blocks):
            if used[block] > 1:
                used[block] -= 1
            else:
                del used[block]
                idle[block] = None
        return self._evict()

    def _evict(self) -> list[int]:
        evicted = []
        while self._idle and len(self.used) + len(self._idle) > self.capacity:
            evicted.append(self._idle.popitem(last=False)[0])
        return evicted


@dataclass(slots=True)
class Job:
    """A request on its way through a worker. ``expected`` is the frontend's estimate of the uncached tokens."""

    number: int
    request: Request
    expected: int
    frontend: int
    held: list[int] = field(default_factory=list)
    uncached: int = 0


class Worker:
    """``tps`` is what it really does in prefill tokens a second."""

    def __init__(self, number: int, tps: float, capacity: float) -> None:
        self.id = NodeId(f"{number:016x}")
        self.tps = tps
        self.cache = PrefixCache(capacity)
        self.queue: deque[Job] = deque()
        self.current: Job | None = None
        self.begun = 0.0
        self.decoding = 0
        self.busy_s = 0.0
        self.hit_blocks = 0
        self.requests = 0
        self.reporting = self.telling = False
        self._work = self._worked = 0.0
        self._expected = 0

    @property
    def idle(self) -> bool:
        return self.current is None and not self.queue and not self.decoding

    def enqueue(self, job: Job, now: float) -> None:
        self.queue.append(job)
        self._work, self._worked = self._recent(now) + job.expected / self.tps, now
        self._expected += job.expected
        self.requests += 1

    def begin(self, now: float) -> float:
        """Start the next prompt of a non-empty queue: when it will be done."""
        job = self.current = self.queue.popleft()
        self._expected -= job.expected
        hits = self.cache.hits(job.request.blocks)
        job.held = job.request.blocks[:hits]
        self.cache.hold(job.held)
        job.uncached = max(1, job.request.tokens - hits * BLOCK)
        self.hit_blocks += hits
        self.begun = now
        took = job.uncached / self.tps
        self.busy_s += took
        return now + took

    def computed(self) -> tuple[Job, list[int], list[int]]:
        """The current prompt is done and decodes: (job, stored, evicted)."""
        job = self.current
        assert job is not None
        self.current = None
        self.decoding += 1
        rest = job.request.blocks[len(job.held) :]
        job.held = job.request.blocks
        return job, *self.cache.hold(rest)

    def ended(self, job: Job) -> list[int]:
        """Its last token is out: what is evicted."""
        self.decoding -= 1
        return self.cache.release(job.held)

    def load(self, now: float) -> Load:
        """What it would publish: of the queue the frontends' estimates, of the current prompt what is left."""
        left = 0.0
        if self.current is not None:
            left = max(0.0, self.current.uncached - (now - self.begun) * self.tps)
        waiting = len(self.queue) + (self.current is not None)
        return Load(
            active_requests=self.decoding + waiting,
            active_blocks=len(self.cache.used),
            prefill_tokens_queued=self._expected + round(left),
            prefill_tps=self.tps,
            itl_ms=ITL_S * 1e3,
            work_s=self._recent(now),
        )

    def _recent(self, now: float) -> float:
        return self._work * exp((self._worked - now) / WORK_MEMORY_S)
