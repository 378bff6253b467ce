"""Workers' caches, several frontends, and a wire that loses, repeats, reorders and delays what it likes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.kv import BLOCK, Cache

from p2pdyn.core import kvstream
from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.kvjournal import KvJournal
from p2pdyn.core.kvsignals import Fetch, Fetched, FetchFailed, Lost, Tick, Up
from p2pdyn.core.kvstream import DIGEST_S, EXACT, NEW, Event, KvStream
from p2pdyn.wire.codec import encode
from p2pdyn.wire.events import KvBatch, KvDigest

WORKERS = range(3)
FRONTENDS = range(2)
LATENCY_S = 0.3
"""Published messages that are older than this have been lost."""

STEP_S = 0.1
HEAL_S = 8.0
"""Every stream is exact this long after the wire is well again: two digests and the longest wait for a fetch."""


@dataclass(frozen=True)
class Letter:
    frontend: int
    worker: int
    event: KvBatch | KvDigest
    sent: float


class Worker:
    """``past`` are the true sets that were, with the time when each ended; the cache is what is true now."""

    def __init__(self, number: int, epoch: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.name = f"{number:016x}"
        self.cache = Cache(self.rng)
        self.journal = self.boot(epoch)
        self.past: list[tuple[float, set[tuple[int, int]]]] = []
        self.alive = True
        self.digest_at = 0.0

    def boot(self, epoch: int) -> KvJournal:
        """Small rings and batches in some, so that replays are refused and steps are split."""
        kept, largest = self.rng.choice((4_000_000, 120)), self.rng.choice((4_000_000, 40))
        return KvJournal(self.name, epoch, 0, BLOCK, replay_bytes=kept, max_ops=largest, max_runs=4)

    def changes(self, now: float) -> None:
        self.past = [(until, held) for until, held in self.past if until >= now - LATENCY_S]
        self.past.append((now, self.cache.truth()))

    def held_lately(self, held: set[tuple[int, int]], now: float) -> bool:
        """``held`` is the true set, or was so short ago that the wire alone explains it."""
        lately = [past for until, past in self.past if until >= now - LATENCY_S]
        return held == self.cache.truth() or held in lately


class Frontend:
    def __init__(self) -> None:
        self.index = KvIndex()
        self.streams = [KvStream(self.index, 0) for _ in WORKERS]
        self.up = [False for _ in WORKERS]
        self.wrong_since: list[float | None] = [None for _ in WORKERS]


class Wire(RuleBasedStateMachine):
    """``letters`` and ``answers`` arrive when, as often and in the order that a rule says; ``loss`` is what time alone
    does to them."""

    def __init__(self) -> None:
        super().__init__()
        self.slices = patch.object(kvstream, "SLICE", 3)
        self.slices.start()
        self.now = 0.0
        self.loss = 0.0
        self.shuffles = self.holds = False
        self.letters: list[Letter] = []
        self.fetches: list[tuple[int, int, Fetch]] = []
        self.answers: list[tuple[int, int, Fetched]] = []
        self.rng = random.Random(0)
        self.workers: list[Worker] = []
        self.frontends = [Frontend() for _ in FRONTENDS]

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.workers = [Worker(number, 1000, self.rng.getrandbits(32)) for number in WORKERS]
        for worker in WORKERS:
            self.connect(worker)

    # What happens

    def do(self, frontend: int, worker: int, event: Event) -> None:
        stream = self.frontends[frontend].streams[worker]
        if isinstance(event, KvBatch) and stream.take(encode(event)):
            return
        for fetch in stream.handle(event, self.now):
            self.fetches.append((frontend, worker, fetch))

    def tick(self) -> None:
        for frontend in FRONTENDS:
            for worker in WORKERS:
                stream = self.frontends[frontend].streams[worker]
                for _ in range(1000):
                    due = stream.next_deadline()
                    if due is None or due > self.now:
                        break
                    self.do(frontend, worker, Tick())
                else:
                    raise AssertionError("it is due for ever")

    def publish(self, worker: int, message: KvBatch | KvDigest) -> None:
        self.letters += [Letter(frontend, worker, message, self.now) for frontend in FRONTENDS]

    def connect(self, worker: int) -> None:
        for frontend in FRONTENDS:
            self.frontends[frontend].up[worker] = True
            self.do(frontend, worker, Up())

    def disconnect(self, frontend: int, worker: int) -> None:
        self.frontends[frontend].up[worker] = False
        self.do(frontend, worker, Lost())
        stream = self.frontends[frontend].streams[worker]
        assert stream.slot is None
        assert (stream.state, stream.blocks) == (NEW, 0)

    def serve(self, frontend: int, worker: int, fetch: Fetch) -> None:
        """The worker answers as of now; when the answer arrives is another matter."""
        side = self.workers[worker]
        if not side.alive:
            self.do(frontend, worker, FetchFailed(fetch.ticket))
            return
        if fetch.what == "kv-snapshot":
            assert fetch.key == "0"
            data: bytes | None = side.journal.snapshot()
        else:
            _, epoch, first = map(int, fetch.key.split(":"))
            data = side.journal.replay(epoch, first)
        self.answers.append((frontend, worker, Fetched(fetch.ticket, data)))

    def flow(self) -> None:
        """The wire does what it does by itself: everything arrives, but for what is lost."""
        if self.holds:
            return
        letters, self.letters = self.letters, []
        fetches, self.fetches = self.fetches, []
        answers, self.answers = self.answers, []
        if self.shuffles:
            self.rng.shuffle(letters)
        for letter in letters:
            if self.rng.random() >= self.loss:
                self.do(letter.frontend, letter.worker, letter.event)
        for frontend, worker, fetch in fetches:
            if self.rng.random() < self.loss:
                self.do(frontend, worker, FetchFailed(fetch.ticket))
            else:
                self.serve(frontend, worker, fetch)
        for frontend, worker, answer in answers:
            self.do(frontend, worker, answer)

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += STEP_S
            for number, worker in enumerate(self.workers):
                if worker.alive and self.now >= worker.digest_at:
                    worker.digest_at = self.now + DIGEST_S
                    self.publish(number, worker.journal.digest())
            self.flow()
            self.letters = [letter for letter in self.letters if letter.sent + LATENCY_S > self.now]
            self.tick()
            self.check()

    @rule(seconds=st.floats(0.1, 5.0))
    def advance(self, seconds: float) -> None:
        self.pass_time(seconds)

    @rule(worker=st.sampled_from(WORKERS), steps=st.integers(1, 4))
    def work(self, worker: int, steps: int) -> None:
        side = self.workers[worker]
        for _ in range(steps if side.alive else 0):
            side.changes(self.now)
            for batch in side.journal.take(side.cache.step()):
                self.publish(worker, batch)
            assert side.journal.held() == side.cache.truth()
            assert not side.journal.orphans

    @rule(worker=st.sampled_from(WORKERS))
    def idle(self, worker: int) -> None:
        if self.workers[worker].alive:
            self.publish(worker, self.workers[worker].journal.digest())

    # What goes wrong

    @rule(loss=st.sampled_from((0.0, 0.0, 0.2, 0.6, 1.0)), shuffles=st.booleans(), holds=st.booleans())
    def weather(self, loss: float, shuffles: bool, holds: bool) -> None:
        self.loss, self.shuffles, self.holds = loss, shuffles, holds

    @precondition(lambda self: self.letters)
    @rule(data=st.data(), again=st.booleans())
    def deliver(self, data: st.DataObject, again: bool) -> None:
        """One letter, whichever; it may stay under way as well, and come once more."""
        place = data.draw(st.integers(0, len(self.letters) - 1))
        letter = self.letters[place] if again else self.letters.pop(place)
        self.do(letter.frontend, letter.worker, letter.event)

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.letters.pop(data.draw(st.integers(0, len(self.letters) - 1)))

    @precondition(lambda self: self.letters)
    @rule(digests=st.booleans(), frontend=st.sampled_from(FRONTENDS))
    def drop_kind(self, digests: bool, frontend: int) -> None:
        """All of one frontend's digests, or all its batches: the last one among them."""
        kind = KvDigest if digests else KvBatch
        self.letters = [one for one in self.letters if not (isinstance(one.event, kind) and one.frontend == frontend)]

    @precondition(lambda self: self.fetches)
    @rule(data=st.data(), fails=st.booleans(), arrives=st.booleans())
    def answer(self, data: st.DataObject, fails: bool, arrives: bool) -> None:
        """A fetch fails, or is served, and the answer may arrive at once, later, or when nobody waits any more."""
        frontend, worker, fetch = self.fetches.pop(data.draw(st.integers(0, len(self.fetches) - 1)))
        if not fails or arrives:
            self.serve(frontend, worker, fetch)
        if fails:
            self.do(frontend, worker, FetchFailed(fetch.ticket))
        elif arrives and self.answers:
            self.do(*self.answers.pop())

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), again=st.booleans())
    def deliver_answer(self, data: st.DataObject, again: bool) -> None:
        place = data.draw(st.integers(0, len(self.answers) - 1))
        self.do(*(self.answers[place] if again else self.answers.pop(place)))

    @rule(frontend=st.sampled_from(FRONTENDS), worker=st.sampled_from(WORKERS), ahead=st.sampled_from((1, 2, 9, 2**60)))
    def forge(self, frontend: int, worker: int, ahead: int) -> None:
        """A batch that the worker never sent: garbage, or blocks that it does not have."""
        foreign = b"\0\0\0\0\1\0\0\0" + self.rng.randbytes(8)
        self.forged(frontend, worker, ahead, self.rng.choice((b"\x00\x01", foreign, bytes(8) + b"\x20\0\0\0\0")))

    def forged(self, frontend: int, worker: int, ahead: int, ops: bytes) -> None:
        stream = self.frontends[frontend].streams[worker]
        name = self.workers[worker].journal.worker
        self.do(frontend, worker, KvBatch(name, stream.epoch, 0, stream.seq + ahead, ops))

    @rule(worker=st.sampled_from(WORKERS), kind=st.sampled_from(("dies", "restarts", "unseen", "epoch")))
    def trouble(self, worker: int, kind: str) -> None:
        """A worker dies; is started again, which the link shows or only the epoch; or takes a new epoch, cache and
        all."""
        side = self.workers[worker]
        side.changes(self.now)
        if kind == "epoch":
            side.journal.raise_epoch(side.journal.epoch + 1)
            assert side.journal.replay(side.journal.epoch, 0) is None
            return
        if kind != "unseen":
            for frontend in FRONTENDS:
                self.disconnect(frontend, worker)
            self.fetches = [one for one in self.fetches if one[1] != worker]
        side.cache = Cache(side.rng)
        side.journal = side.boot(side.journal.epoch + 1000)
        side.alive = kind != "dies"
        if side.alive:
            self.connect(worker)

    @rule(frontend=st.sampled_from(FRONTENDS), worker=st.sampled_from(WORKERS))
    def link_breaks(self, frontend: int, worker: int) -> None:
        self.disconnect(frontend, worker)

    @rule(frontend=st.sampled_from(FRONTENDS), budget=st.integers(1, 5))
    def sweep(self, frontend: int, budget: int) -> None:
        self.frontends[frontend].index.sweep(budget)

    # What must hold

    @invariant()
    def check(self) -> None:
        for side in self.frontends:
            slots = [stream.slot for stream in side.streams if stream.slot is not None]
            assert len(set(slots)) == len(slots)
            for worker, stream in enumerate(side.streams):
                self.check_stream(side, self.workers[worker], worker, stream)

    def check_stream(self, side: Frontend, worker: Worker, number: int, stream: KvStream) -> None:
        if not worker.alive or not side.up[number]:
            assert stream.slot is None
            assert stream.state == NEW
        held = side.index.held(stream.slot) if stream.slot is not None else set()
        assert len(held) == stream.blocks
        assert bool(stream.why) is (stream.state != EXACT)
        if worker.held_lately(held, self.now):
            side.wrong_since[number] = None
            return
        since = side.wrong_since[number]
        if since is None:
            since = side.wrong_since[number] = self.now
        if stream.state == EXACT:
            assert self.now - since <= 2 * DIGEST_S + STEP_S, f"wrong for {self.now - since:.2f} s and calls it exact"

    def teardown(self) -> None:
        """The wire is well again: every stream is exact in time, and the index is what the workers hold."""
        try:
            if self.workers:
                self.heal()
        finally:
            self.slices.stop()

    def heal(self) -> None:
        self.loss, self.shuffles, self.holds = 0.0, False, False
        for number, worker in enumerate(self.workers):
            if worker.alive:
                self.connect(number)
        self.pass_time(HEAL_S)
        self.healed()
        for number, worker in enumerate(self.workers):
            if worker.alive:  # what was forged looks like the next batch, so that only a digest can tell
                self.forged(number % len(FRONTENDS), number, 1, b"\0\0\0\0\1\0\0\0" + self.rng.randbytes(8))
                self.work(number, 1)
        self.pass_time(HEAL_S)
        self.healed()

    def healed(self) -> None:
        for side in self.frontends:
            while not side.index.sweep(10):
                pass
            truths = set()
            for worker, stream in zip(self.workers, side.streams, strict=True):
                if not worker.alive:
                    continue
                truth = worker.cache.truth()
                assert stream.state == EXACT, f"{stream.state}: {stream.why}"
                assert stream.slot is not None
                assert side.index.held(stream.slot) == truth
                assert (stream.epoch, stream.seq) == (worker.journal.epoch, worker.journal.seq)
                truths |= truth
            assert len(side.index) == len(truths)


TestWire = Wire.TestCase
TestWire.settings = settings(
    max_examples=40,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
