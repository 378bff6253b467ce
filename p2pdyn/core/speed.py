"""How fast a worker is, measured from what its engine does: what routers need to compare unlike machines.

Prefill: an engine computes prompts one after the other, in chunks and mixed with decodes, so the prompts that got their
first token now were computed since the later of their own submit and the first token before it; one that waited for a
place in a full batch, since it got the place.  The speed is tokens
over time, both summed with exponential forgetting, so that long prompts count as they should.  It is published once a
few prompts agree on it: one slow first prompt would keep all others away, and nothing would ever correct it.

Decode: the time from one step to the next, in steps without prefill, against the KV blocks in use; a line is fitted by
least squares with exponential forgetting.  Its slope is what another block of context costs every step.  A router
multiplies it by blocks and by tokens, tens of thousands of times, so what is published is what the slope is at least:
the noise of a busy machine must not look like a difference between two workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import exp, sqrt

from p2pdyn.constants import WORK_MEMORY_S

MIN_TOKENS = 64
"""Shorter prefills are mostly overhead; they would make a worker look slow."""
KEEP = 0.9
"""Weight of the past at each finished prefill: about the last ten."""
FOLLOW = 0.1
"""How far, in logarithms, the speed at which a minute's work counts follows the measured one with each prompt."""
UNLIKE = 2.0
"""By this factor a measured speed is another one, and not noise: an engine has warmed up, a host has slowed down."""
KEEP_STEP = 0.995
"""At each sampled step: about the last two hundred."""
MIN_PREFILLS = 2.5
"""Of that weight, that is three, before a speed is published."""
MAX_ERROR = 0.3
"""Standard error of a published speed, as a share of it. Where prompts differ more than that, because the machine is
starved or they are computed in no time, two equal workers would seem to be unlike."""
MAX_FREED = 4096
"""Places remembered that became free: more than a batch has."""
MIN_STEPS = 50
SURE = 3.0
"""Standard errors by which the slope is published lower than fitted. They are small where it matters: on a GPU whose
steps vary by a millisecond with their blocks, a few percent of it after two hundred steps."""
SAMPLE_S = 0.005
"""Steps are sampled no more often than this: a sim without waiting makes thousands a second."""
STALL_S, COLD_STALL_S = 15.0, 60.0
"""An engine with work that makes no step for so long, and three times as long as its prompts should take, stands still.
Before it has computed one nobody knows how long that is: the second."""
LONG_S = 5.0
"""A longer gap between steps was no decoding (the process stood still)."""
PULL_TOKENS = 256
"""Fewer are mostly overhead."""
PULL_WEIGHT = 0.5
PULL_MEMORY_S = 60.0
"""After this long a measured pull counts for a third: one slow one, a first one above all, must not end hand-overs for
ever."""


class SpeedMeter:
    """Fed by the worker; ``now`` in seconds, blocks are KV blocks in use."""

    def __init__(self) -> None:
        self._prefilling: dict[int, tuple[int, int, float]] = {}
        self._last_first = 0.0
        self._freed: deque[float] = deque(maxlen=MAX_FREED)
        """When places in the batch became free that somebody waited for; taken in the same order."""
        self._priced = self._work = self._worked = 0.0
        self._prefills = self._tokens = self._seconds = 0.0
        self._tt = self._ts = self._ss = 0.0
        self._sampled = self._stepped = 0.0
        self._pure = False
        self._n = self._x = self._y = self._xx = self._xy = self._yy = 0.0

    # What the engine does.

    def submitted(self, key: int, tokens: int, expected: int, now: float) -> None:
        """A prompt of ``tokens``, of which ``expected`` are believed not to be cached; 0: nobody knows."""
        uncached = min(expected, tokens) if expected else tokens
        self._prefilling[key] = (tokens, uncached, now)
        self._work = self._work * exp((self._worked - now) / WORK_MEMORY_S) + uncached
        self._worked = now
        if speed := self.prefill_tps:
            noise = 1 / UNLIKE < speed / (self._priced or speed) < UNLIKE
            self._priced = self._priced ** (1 - FOLLOW) * speed**FOLLOW if self._priced and noise else speed

    def first_tokens(self, started: Iterable[tuple[int, int]], now: float) -> None:
        """Prompts whose first token has come in one step, as (key, tokens of it from the prefix cache)."""
        tokens, since = 0, now
        for key, cached in started:
            begun = self._prefilling.pop(key, None)
            if begun is not None:
                tokens += begun[0] - cached
                came = begun[2]
                while self._freed and self._freed[0] <= came:
                    self._freed.popleft()
                if self._freed:
                    came = self._freed.popleft()
                since = min(since, came)
        since, self._last_first = max(since, self._last_first), now
        if tokens >= MIN_TOKENS and now > since:
            took = now - since
            self._prefills = KEEP * self._prefills + 1.0
            self._tokens = KEEP * self._tokens + tokens
            self._seconds = KEEP * self._seconds + took
            self._tt = KEEP**2 * self._tt + tokens * tokens
            self._ts = KEEP**2 * self._ts + tokens * took
            self._ss = KEEP**2 * self._ss + took * took

    def freed(self, places: int, now: float) -> None:
        """So many sequences have ended while others waited for their places in the batch."""
        self._freed.extend([now] * places)

    def unhindered(self) -> None:
        """Nobody waits for a place in the batch."""
        self._freed.clear()

    def gone(self, key: int) -> None:
        """Aborted, or ended without a token."""
        self._prefilling.pop(key, None)

    def clear(self) -> None:
        """The engine holds nothing any more."""
        self._prefilling.clear()
        self._freed.clear()
        self._pure = False

    def step(self, decoding: int, now: float) -> float:
        """A step has ended that ``decoding`` sequences took part in: how long it took, for :meth:`sample`, or 0 if
        that says nothing or was asked for a moment ago."""
        pure = decoding > 0 and not self._prefilling
        took, self._stepped = now - self._stepped, now
        wanted = pure and self._pure and took < LONG_S and now - self._sampled >= SAMPLE_S
        self._pure = pure
        if not wanted:
            return 0.0
        self._sampled = now
        return took

    def sample(self, took: float, blocks: int) -> None:
        """A step without prefill took so many seconds with so many blocks in use."""
        keep, x = KEEP_STEP, float(blocks)
        self._n = keep * self._n + 1.0
        self._x = keep * self._x + x
        self._y = keep * self._y + took
        self._xx = keep * self._xx + x * x
        self._xy = keep * self._xy + x * took
        self._yy = keep * self._yy + took * took

    # What is known of it.

    @property
    def backlog(self) -> int:
        """Prompt tokens that sequences without a first token were expected to compute; those done count as well."""
        return sum(expected for _, expected, _ in self._prefilling.values())

    def work_s(self, now: float) -> float:
        """Seconds of prefill taken on, that of a minute ago for a third; 0 while no speed is sure. It follows the speed
        slowly: else a minute's work would grow and shrink with each measurement's noise."""
        return self._work * exp((self._worked - now) / WORK_MEMORY_S) / self._priced if self._priced else 0.0

    @property
    def timed(self) -> bool:
        """Some prompt has been."""
        return self._prefills > 0.0

    @property
    def prefill_tps(self) -> float:
        """Tokens a second; 0 while nothing is sure. The error is that of a ratio of weighted sums (Cochran 1977,
        section 6), so squares have squared weights."""
        if self._prefills < MIN_PREFILLS:
            return 0.0
        each = self._seconds / self._tokens
        rest = max(0.0, self._ss - 2 * each * self._ts + each * each * self._tt)
        return 1.0 / each if sqrt(rest) <= MAX_ERROR * self._seconds else 0.0

    @property
    def patience_s(self) -> float:
        """Seconds without a step after which an engine that has work stands still."""
        return STALL_S + 3 * self.backlog * self._seconds / self._tokens if self._tokens else COLD_STALL_S

    def itl_ms(self, blocks: int) -> float:
        """Milliseconds from token to token with ``blocks`` in use; 0 until something has been measured."""
        if self._n < 1:
            return 0.0
        slope = self.itl_per_block_ms / 1e3
        mean_x, mean_y = self._x / self._n, self._y / self._n
        return 1e3 * max(0.0, mean_y + slope * (blocks - mean_x))

    @property
    def itl_per_block_ms(self) -> float:
        """Milliseconds that one more block adds to every step, at least; 0 until there were steps with unlike block
        counts, and while nothing is sure."""
        n, spread = self._n, self._n * self._xx - self._x * self._x
        if n < MIN_STEPS or spread <= 1e-3 * n * self._xx:
            return 0.0
        slope = (n * self._xy - self._x * self._y) / spread
        rest = n * self._yy - self._y * self._y - slope * slope * spread
        return 1e3 * max(0.0, slope - SURE * sqrt(max(0.0, rest) / ((n - 2.0) * spread)))


class PullMeter:
    """How long a token's KV takes that the engine fetches from another worker by itself: from its submit to the first
    token of its answer, less ``overhead_s``.  ``assumed_s`` a token until there is news, and again as that ages."""

    def __init__(self, assumed_s: float, overhead_s: float) -> None:
        self._assumed = assumed_s
        self._overhead = overhead_s
        self._measured = assumed_s
        self._at = 0.0
        self._open: dict[int, tuple[int, float]] = {}

    def begun(self, key: int, tokens: int, now: float) -> None:
        """A sequence was submitted of whose prompt ``tokens`` are elsewhere."""
        self._open[key] = tokens, now

    def first_token(self, key: int, now: float) -> None:
        """Of a sequence; those that fetch nothing are ignored."""
        found = self._open.pop(key, None)
        if found is None or found[0] < PULL_TOKENS:
            return
        took = max(0.0, now - found[1] - self._overhead) / found[0]
        known = self.token_s(now)
        self._measured, self._at = known + PULL_WEIGHT * (took - known), now

    def gone(self, key: int) -> None:
        """Aborted, or ended without a token."""
        self._open.pop(key, None)

    def token_s(self, now: float) -> float:
        """Seconds a token."""
        return self._assumed + (self._measured - self._assumed) * exp((self._at - now) / PULL_MEMORY_S)
