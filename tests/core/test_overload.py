"""Overload in virtual time: where requests wait, and how soon it is over. Real frontends; workers are a batch."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from heapq import heappop, heappush
from statistics import median

import pytest

from p2pdyn.constants import LOAD_EVENT_S, LOAD_SOON_S
from p2pdyn.core.admission import MIN_SUPPLY
from p2pdyn.core.flight import Flights
from p2pdyn.core.flight_parts import Action, Dispatch
from p2pdyn.core.load_meter import LoadMeter
from p2pdyn.core.request import Job, Logprobs, Outcome, Rejected
from p2pdyn.core.router import Ask, Router
from p2pdyn.core.router_target import Target
from p2pdyn.core.routes import Endpoint, Routes, Serving
from p2pdyn.core.types import Load, NodeId, SamplingParams
from p2pdyn.wire.requests import Row

HOP_S, ITL_S, TPS, PROMPT, ANSWER = 0.001, 0.01, 20000.0, 40, 20
CALM_S, OVERLOAD_S, AFTER_S = 8.0, 8.0, 12.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0

    def later(self, seconds: float, act: Callable[..., None], *args: object) -> None:
        self._count += 1
        heappush(self._due, (self.now + seconds, self._count, act, args))

    def run(self, until: float) -> None:
        while self._due and self._due[0][0] <= until:
            self.now, _, act, args = heappop(self._due)
            act(*args)


@dataclass
class Asked:
    """A sink."""

    clock: Clock
    at: float
    ttft_s: float | None = None

    def on_routed(self, worker: NodeId) -> None:
        pass

    def on_tokens(self, tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None:
        if self.ttft_s is None:
            self.ttft_s = self.clock.now - self.at

    def on_end(self, outcome: Outcome) -> None:
        assert outcome.finish == "length"


class Worker:
    """A batch of ``slots``, in order of arrival; a step is the prefill of who has come and a token for the others."""

    def __init__(self, number: int, clock: Clock, slots: int, frontends: list[Frontend]) -> None:
        self.id = NodeId(f"{number:016x}")
        self.waiting: deque[tuple[Frontend, Dispatch]] = deque()
        self.longest = 0
        self._clock, self._slots, self._frontends = clock, slots, frontends
        self._running: dict[int, tuple[Frontend, Dispatch, int]] = {}
        self._meter = LoadMeter(self.id)
        self._keys = 0
        self._busy = self._telling = False
        clock.later(LOAD_EVENT_S * number / 7, self._tick)

    def take(self, frontend: Frontend, dispatch: Dispatch) -> None:
        self.waiting.append((frontend, dispatch))
        self.longest = max(self.longest, len(self.waiting) + len(self._running) - self._slots)
        if not self._busy:
            self._tell_soon()
        if not self._running:
            self._plan()

    def _plan(self) -> None:
        took = ITL_S if self._running else 0.0
        while self.waiting and len(self._running) < self._slots:
            frontend, dispatch = self.waiting.popleft()
            self._keys += 1
            self._running[self._keys] = frontend, dispatch, 0
            self._meter.submitted(self._keys, PROMPT, dispatch.uncached, self._clock.now)
            took += PROMPT / TPS
        if self._running:
            self._clock.later(took, self._step)

    def _step(self) -> None:
        rows: dict[int, list[Row]] = {}
        started = [(key, 0) for key, (_, _, done) in self._running.items() if not done]
        for key, (frontend, dispatch, done) in list(self._running.items()):
            finish = "length" if done + 1 == ANSWER else ""
            self._running[key] = frontend, dispatch, done + 1
            if finish:
                del self._running[key]
            row = (dispatch.rid, dispatch.attempt, done, (1,), finish, 0, b"")
            rows.setdefault(self._frontends.index(frontend), []).append(row)
        self._meter.stepped(started, sum(map(len, rows.values())), len(self._running), self._clock.now, -1)
        for number, mine in rows.items():
            self._clock.later(HOP_S, self._frontends[number].tokens, self.id, mine)
        if not (self._running or self.waiting):
            self._tell_soon()
        self._plan()

    def _tell_soon(self) -> None:
        if not self._telling:
            self._telling = True
            self._clock.later(LOAD_SOON_S, self._tell)

    def _tell(self) -> None:
        running, waiting = len(self._running), len(self.waiting)
        self._telling, self._busy = False, running > 0
        load = Load(running, running, waiting, running, 8192, waiting * PROMPT, TPS, ITL_S * 1e3)
        event = self._meter.event(1, load, running + waiting, 0, 0.0, self._clock.now, self._slots)
        told = Load(**{one.name: getattr(event, one.name) for one in fields(Load)})
        for frontend in self._frontends:
            self._clock.later(HOP_S, frontend.report, self.id, told)

    def _tick(self) -> None:
        self._tell()
        self._clock.later(LOAD_EVENT_S, self._tick)


class Frontend:
    def __init__(self, number: int, clock: Clock) -> None:
        self.workers: dict[NodeId, Worker] = {}
        self.flights = Flights(Routes(Router("kv", random.Random(number))), lambda data: ())
        self.refused = 0
        self._clock = clock

    def up(self, workers: list[Worker]) -> None:
        self.workers = {worker.id: worker for worker in workers}
        self.flights.routable({"m": Serving(16, tuple(Endpoint(worker.id, 0, True) for worker in workers))}, 0.0)

    def ask(self, asked: Asked, prompt: array[int]) -> None:
        job = Job("m", prompt, SamplingParams(max_tokens=ANSWER), client="one")
        try:
            self._carry_out(self.flights.submit(job, asked, self._clock.now)[1])
        except Rejected:
            self.refused += 1

    def tokens(self, worker: NodeId, rows: list[Row]) -> None:
        self._carry_out(self.flights.tokens(worker, rows, self._clock.now))

    def report(self, worker: NodeId, load: Load) -> None:
        self._carry_out(self.flights.report(worker, 0, load, self._clock.now))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            assert isinstance(action, Dispatch)
            self._clock.later(HOP_S, self.workers[action.worker].take, self, action)


@dataclass
class Overload:
    """Half of what the workers can do, then three times as much, then half again."""

    slots: int
    frontends: list[Frontend]
    workers: list[Worker]
    asked: list[Asked] = field(default_factory=list)

    def ttft_s(self, since: float, until: float) -> list[float]:
        return sorted(one.ttft_s for one in self.asked if since <= one.at < until and one.ttft_s is not None)


def overload(slots: int, workers: int, frontends: int) -> Overload:
    clock, rng = Clock(), random.Random(1)
    faces = [Frontend(number, clock) for number in range(frontends)]
    run = Overload(slots, faces, [Worker(number + 1, clock, slots, faces) for number in range(workers)])
    for face in faces:
        face.up(run.workers)
    capacity, at = workers * slots / (ANSWER * ITL_S), 0.0
    for rate, until in ((0.5, CALM_S), (3.0, CALM_S + OVERLOAD_S), (0.5, CALM_S + OVERLOAD_S + AFTER_S)):
        while (at := at + rng.expovariate(rate * capacity)) < until:
            run.asked.append(Asked(clock, at))
            prompt = array("I", [rng.randrange(1 << 30) for _ in range(PROMPT)])
            clock.later(at, rng.choice(faces).ask, run.asked[-1], prompt)
        at = until
    clock.run(at)
    return run


@pytest.mark.parametrize(("slots", "workers", "frontends"), [(8, 2, 1), (8, 3, 2)])
def test_what_is_too_much_waits_in_the_frontend_and_is_gone_within_seconds(
    slots: int, workers: int, frontends: int
) -> None:
    run = overload(slots, workers, frontends)
    assert all(frontend.refused for frontend in run.frontends)
    supply = frontends * max(MIN_SUPPLY, slots // 4)
    assert max(worker.longest for worker in run.workers) <= 2 * supply + slots // 2
    over = CALM_S + OVERLOAD_S
    before, after = run.ttft_s(1.0, CALM_S), run.ttft_s(over + 6.0, over + AFTER_S - 1.0)
    assert median(after) <= 1.1 * median(before) + 0.002
    assert after[int(0.9 * len(after))] <= before[int(0.9 * len(before))] + 0.1


def test_nobody_is_sent_behind_a_full_batch_while_another_has_a_free_place() -> None:
    full, free = Target(NodeId("a" * 16)), Target(NodeId("b" * 16))
    full.report(Load(active_requests=4, slots=4, itl_ms=10.0, prefill_tps=5000.0, work_s=1.0), 0.0)
    free.report(Load(active_requests=3, slots=4, itl_ms=10.0, prefill_tps=5000.0, work_s=30.0), 0.0)
    decision = Router("kv", random.Random(1)).choose(Ask(40), [full, free], 0.0)
    assert decision is not None
    assert decision.target is free


def test_waiting_for_a_place_counts_in_seconds() -> None:
    target = Target(NodeId("a" * 16))
    target.report(Load(active_requests=4, queued=2, slots=4, itl_ms=10.0), 0.0)
    assert target.behind == 3
    assert target.wait_s(0.0, 100.0) == pytest.approx(3 * 100.0 * 0.01 / 4)
    target.report(Load(active_requests=3, slots=4, itl_ms=10.0), 1.0)
    assert (target.behind, target.wait_s(1.0, 100.0)) == (0, 0.0)
