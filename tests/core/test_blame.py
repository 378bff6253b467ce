"""Requests that kill their workers end soon; those beside them go on, however many workers they lost with them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pdyn.core.blame import DEATH_LIMIT, PROOF_S, TRIAL_S, Blame
from p2pdyn.core.flight import Flights
from p2pdyn.core.flight_parts import Abandon, Action, Dispatch
from p2pdyn.core.request import Job, Logprobs, Outcome
from p2pdyn.core.router import Router
from p2pdyn.core.routes import Endpoint, Routes, Serving
from p2pdyn.core.trials import TRIALS_S
from p2pdyn.core.types import NodeId, SamplingParams
from p2pdyn.wire.requests import Delta

STEP_S = 0.01
W = [NodeId(f"{number:016x}") for number in range(8)]


class Reader:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.outcome: Outcome | None = None
        self.heard = self.silence = 0.0

    def on_routed(self, worker: NodeId) -> None:
        pass

    def on_tokens(self, tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None:
        self.tokens += tokens

    def on_end(self, outcome: Outcome) -> None:
        assert self.outcome is None
        self.outcome = outcome


class Cluster:
    """Workers that make token ``position`` of each request each step, and die when ``kills(rid, attempt age)`` says so.
    A dead one is back after ``restart_s``."""

    def __init__(self, workers: int, kills: Callable[[int, int], bool], restart_s: float = 1e9) -> None:
        self.kills, self.restart_s = kills, restart_s
        self.now = 0.0
        self.flights = Flights(Routes(Router("round-robin", random.Random(1))), lambda data: ())
        self.up = set(W[:workers])
        self.back: list[tuple[float, NodeId]] = []
        self.deaths: list[NodeId] = []
        self.jobs: dict[NodeId, dict[int, tuple[int, int, int]]] = {worker: {} for worker in W}
        self.readers: dict[int, Reader] = {}
        self.most: dict[int, int] = {}
        self.serve()

    def serve(self) -> None:
        targets = tuple(Endpoint(worker) for worker in sorted(self.up))
        self.take(self.flights.routable({"m": Serving(16, targets)}, self.now))

    def take(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Dispatch):
                assert action.worker in self.up
                self.jobs[action.worker][action.rid] = (action.attempt, len(action.tokens) - 3, 0)
            elif isinstance(action, Abandon):
                self.jobs[action.worker].pop(action.rid, None)

    def submit(self, tokens: int, resumable: bool = True) -> int:
        reader = Reader()
        reader.heard = self.now
        job = Job("m", array("I", [1, 2, 3]), SamplingParams(), resumable)
        rid, actions = self.flights.submit(job, reader, self.now)
        self.readers[rid], self.most[rid] = reader, tokens
        self.take(actions)
        return rid

    def step(self) -> None:
        self.now += STEP_S
        for worker in sorted(self.up):
            jobs = self.jobs[worker]
            if any(self.kills(rid, age) for rid, (_, _, age) in jobs.items()):
                self.die(worker)
                continue
            rows = []
            for rid, (attempt, position, age) in list(jobs.items()):
                finish = "length" if position + 1 >= self.most[rid] else ""
                rows.append(Delta(rid, attempt, position, (position,), finish, 0, b""))
                jobs[rid] = (attempt, position + 1, age + 1)
                if finish:
                    del jobs[rid]
            for row in rows:
                reader = self.readers[row.rid]
                reader.silence = max(reader.silence, self.now - reader.heard)
                reader.heard = self.now
            self.take(self.flights.tokens(worker, rows, self.now))
        for at, worker in [one for one in self.back if one[0] <= self.now]:
            self.back.remove((at, worker))
            self.up.add(worker)
            self.serve()
        self.take(self.flights.tick(self.now))

    def die(self, worker: NodeId) -> None:
        self.up.discard(worker)
        self.deaths.append(worker)
        self.back.append((self.now + self.restart_s, worker))
        self.jobs[worker].clear()
        self.take(self.flights.worker_lost(worker, "gone", self.now, died=True))
        self.serve()

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.flights.open and self.now < until:
            self.step()
        assert not self.flights.open
        assert not self.flights.trials.blame._deaths
        assert not self.flights.trials.blame._trials
        assert not self.flights.trials.blame._passed


@settings(max_examples=60, deadline=None)
@given(
    workers=st.integers(1, 6),
    innocents=st.integers(0, 24),
    place=st.integers(0, 24),
    dies_at=st.sampled_from([0, 0, 1, 3, 20]),
    warm=st.integers(0, 40),
    restart_s=st.sampled_from([0.5, 3.0]),
)
def test_a_poison_ends_and_whoever_is_beside_it_goes_on(
    workers: int, innocents: int, place: int, dies_at: int, warm: int, restart_s: float
) -> None:
    poison: list[int] = []
    cluster = Cluster(workers, lambda rid, age: rid in poison and age >= dies_at, restart_s)
    for number in range(innocents + 1):
        if number == min(place, innocents):
            poison.append(cluster.submit(1000))
        else:
            cluster.submit(200)
    for _ in range(warm):
        cluster.step()
    cluster.run(120)
    ended = cluster.readers[poison[0]].outcome
    assert ended is not None
    assert ended.failure is not None
    assert (ended.failure.status, ended.failure.code) == (500, "request_kills_workers")
    assert len(cluster.deaths) == DEATH_LIMIT
    for rid, reader in cluster.readers.items():
        if rid not in poison:
            assert reader.outcome is not None
            assert (reader.outcome.finish, reader.tokens) == ("length", list(range(200)))


def test_a_fourth_worker_remains_and_streams_there_are_not_interrupted() -> None:
    poison: list[int] = []
    cluster = Cluster(4, lambda rid, age: rid in poison)
    for _ in range(16):
        cluster.submit(300)
    for _ in range(30):
        cluster.step()
    poison.append(cluster.submit(100))
    cluster.run(60)
    assert len(cluster.deaths) == DEATH_LIMIT
    innocents = [reader for rid, reader in cluster.readers.items() if rid not in poison]
    assert all(reader.tokens == list(range(300)) for reader in innocents)
    # Longest for one that had to be tried after another one.
    assert max(reader.silence for reader in innocents) < 3 * TRIAL_S


def test_one_that_kills_late_is_found_by_longer_trials() -> None:
    poison: list[int] = []
    cluster = Cluster(6, lambda rid, age: rid in poison and age * STEP_S > 1.2, restart_s=0.3)
    for _ in range(8):
        cluster.submit(800)
    poison.append(cluster.submit(10_000))
    cluster.run(120)
    assert len(cluster.deaths) <= DEATH_LIMIT + 1
    assert [r.outcome.finish for r in cluster.readers.values() if r.outcome] == ["length"] * 8 + ["error"]


def test_two_poisons_end_both() -> None:
    poison: list[int] = []
    cluster = Cluster(5, lambda rid, age: rid in poison, restart_s=1.0)
    for _ in range(10):
        cluster.submit(300)
    poison += [cluster.submit(50), cluster.submit(50)]
    cluster.run(120)
    assert all((cluster.readers[rid].outcome or Outcome("", ())).finish == "error" for rid in poison)
    assert len(cluster.deaths) <= 2 * DEATH_LIMIT
    assert all(r.tokens == list(range(300)) for rid, r in cluster.readers.items() if rid not in poison)


def test_workers_that_die_of_themselves_cost_no_request_its_answer() -> None:
    """A fault every half second, whoever is there: nobody is blamed, as nobody's trial is cut short each time."""
    cluster = Cluster(6, lambda rid, age: False, restart_s=1.0)
    rids = [cluster.submit(1500) for _ in range(16)]
    rng = random.Random(5)
    while cluster.flights.open and cluster.now < 60:
        cluster.step()
        if round(cluster.now / STEP_S) % 300 == 0 and len(cluster.up) > 2:
            cluster.die(rng.choice(sorted(cluster.up)))
    assert len(cluster.deaths) >= 5
    assert all(cluster.readers[rid].tokens == list(range(1500)) for rid in rids)


def test_a_worker_that_was_only_cut_off_is_no_death() -> None:
    blame = Blame()
    for _ in range(5):
        assert blame.died(W[0], [1, 2]) is None
        blame.lives(W[0])
        assert blame.died(W[1], [1, 2]) is None
        blame.lives(W[1])
        assert not blame.suspect(1)
    blame.died(W[0], [1])
    blame.died(W[1], [1])
    assert blame.suspect(1)
    blame.lives(W[1])
    assert not blame.suspect(1)


def test_a_suspect_is_given_up_if_no_worker_is_ever_free() -> None:
    cluster = Cluster(1, lambda rid, age: False)
    one, other = cluster.submit(10), cluster.submit(10)
    for worker in W[5:7]:
        cluster.flights.trials.blame.died(worker, [one, other])
    cluster.take(cluster.flights.worker_lost(W[0], "silent", cluster.now))
    cluster.serve()
    assert cluster.flights.open_at(W[0]) == 1
    cluster.jobs[W[0]].clear()  # it never says a word of it
    cluster.now += TRIALS_S
    cluster.take(cluster.flights.tick(cluster.now))
    (ended,) = [reader.outcome for reader in cluster.readers.values() if reader.outcome is not None]
    assert ended.failure is not None
    assert (ended.failure.status, ended.failure.code) == (503, "worker_lost")


@pytest.mark.parametrize("died", [True, False])
def test_losses_that_are_no_deaths_make_no_suspects(died: bool) -> None:
    cluster = Cluster(4, lambda rid, age: False)
    rid = cluster.submit(100)
    for _ in range(2):
        worker = cluster.flights.open[rid].worker
        assert worker is not None
        cluster.take(cluster.flights.worker_lost(worker, "silent", 0.0, died=died))
    assert cluster.flights.trials.blame.suspect(rid) == died


def test_a_suspect_that_cannot_be_continued_ends_with_its_third_worker() -> None:
    cluster = Cluster(4, lambda rid, age: False)
    rid = cluster.submit(100, resumable=False)
    for deaths in range(1, DEATH_LIMIT + 1):
        if deaths == DEATH_LIMIT:
            cluster.step()  # the client has a token
        worker = cluster.flights.open[rid].worker
        assert worker is not None
        cluster.die(worker)
    ended = cluster.readers[rid].outcome
    assert ended is not None
    assert ended.failure is not None
    assert (ended.failure.status, ended.failure.code) == (503, "worker_lost")
    cluster.now += PROOF_S
    cluster.step()  # nobody is left to be sentenced


def test_a_worker_that_comes_back_unchanged_acquits_whom_it_was_lost_with() -> None:
    """This frontend stood still: its links break one after the other, and are made again."""
    cluster = Cluster(3, lambda rid, age: False)
    rids = [cluster.submit(100) for _ in range(6)]
    for _ in range(3):
        for worker in sorted(cluster.up):
            cluster.up.discard(worker)
            cluster.jobs[worker].clear()
            cluster.take(cluster.flights.worker_lost(worker, "cut", cluster.now, died=True))
        for worker in W[:3]:
            cluster.up.add(worker)
            cluster.take(cluster.flights.worker_lives(worker, cluster.now))
            cluster.serve()
        cluster.step()
    cluster.run(10)
    assert all(cluster.readers[rid].tokens == list(range(100)) for rid in rids)
