from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pdyn.core.supervise import (
    BACKOFF_S,
    DRAIN_S,
    HURRY_S,
    STEADY_S,
    Action,
    AllReady,
    BecameReady,
    Begin,
    Exited,
    Finished,
    Kill,
    Revive,
    Say,
    Spawn,
    Stop,
    Supervision,
    Terminate,
    Tick,
)


def begun(workers: int, *, ready: bool = True, now: float = 0.0) -> Supervision:
    core = Supervision(workers)
    assert core.handle(Begin(), now) == [Spawn(i) for i in range(workers)]
    if ready:
        for i in range(workers):
            core.handle(BecameReady(i), now)
    return core


def test_ready_is_told_once_when_all_are() -> None:
    core = begun(2, ready=False)
    assert core.handle(BecameReady(1), 1.0) == []
    assert core.handle(BecameReady(0), 2.0) == [AllReady()]
    core.handle(Exited(0, 1), 3.0)
    assert core.handle(Tick(), 4.0) == [Spawn(0)]
    assert core.handle(BecameReady(0), 5.0) == []


def test_one_that_ended_before_the_other_was_ready_is_waited_for() -> None:
    core = begun(2, ready=False)
    core.handle(BecameReady(0), 1.0)
    core.handle(Exited(0, -9), 2.0)
    assert core.handle(BecameReady(1), 2.5) == []
    assert core.handle(Tick(), 3.0) == [Spawn(0)]
    assert core.handle(BecameReady(0), 4.0) == [AllReady()]


def test_restarts_back_off_and_say_so() -> None:
    core, now = begun(1), 0.0
    for failure, delay in enumerate((*BACKOFF_S, BACKOFF_S[-1]), 1):
        [said] = core.handle(Exited(0, 1), now)
        assert isinstance(said, Say)
        assert f"starts again in {delay:g} s" in said.text
        assert ("in a row" in said.text) == (failure > 1)
        assert core.next_deadline() == now + delay
        assert core.handle(Tick(), now + delay - 0.01) == []
        now += delay
        assert core.handle(Tick(), now) == [Spawn(0)]


def test_a_minute_of_being_ready_resets_the_back_off() -> None:
    core = begun(1)
    core.handle(Exited(0, 1), 0.0)
    core.handle(Tick(), 1.0)
    core.handle(BecameReady(0), 2.0)
    core.handle(Exited(0, 1), 2.0 + STEADY_S - 1)
    assert core.next_deadline() == 2.0 + STEADY_S - 1 + BACKOFF_S[1]
    core.handle(Tick(), 100.0)
    core.handle(BecameReady(0), 101.0)
    core.handle(Exited(0, 1), 101.0 + STEADY_S)
    assert core.next_deadline() == 101.0 + STEADY_S + BACKOFF_S[0]


def test_a_misconfigured_worker_fails_the_supervisor_at_the_start_only() -> None:
    core = begun(2, ready=False)
    said, *rest = core.handle(Exited(0, 2), 0.0)
    assert isinstance(said, Say)
    assert rest == [Terminate(1)]
    assert core.handle(Exited(1, 0), 1.0) == [Finished(2)]

    core = begun(2)
    core.handle(Exited(0, 2), 0.0)
    assert core.next_deadline() == BACKOFF_S[0]


def test_a_drained_worker_stays_down_until_it_is_revived() -> None:
    core = begun(2)
    [said] = core.handle(Exited(0, 0), 1.0)
    assert isinstance(said, Say)
    assert "SIGHUP" in said.text
    assert core.next_deadline() is None
    assert core.handle(Tick(), 100.0) == []
    assert core.running == 1
    assert core.handle(Revive(), 101.0) == [Spawn(0)]
    assert core.handle(Revive(), 102.0) == []
    core.handle(Exited(0, 0), 103.0)
    assert core.handle(Stop(), 104.0) == [Terminate(1)]
    assert core.handle(Revive(), 105.0) == []
    assert core.handle(Exited(1, 0), 106.0) == [Finished(0)]


def test_drained_before_the_others_were_ready_it_is_not_waited_for() -> None:
    core = begun(2, ready=False)
    core.handle(BecameReady(0), 1.0)
    core.handle(Exited(0, 0), 2.0)
    assert core.handle(BecameReady(1), 3.0) == [AllReady()]


def test_stop_drains_all_together() -> None:
    core = begun(3)
    core.handle(Exited(2, 1), 0.0)
    assert core.handle(Stop(), 0.5) == [Terminate(0), Terminate(1)]
    assert core.handle(Exited(0, 0), 1.0) == []
    assert core.handle(Tick(), 5.0) == []
    assert core.handle(Exited(1, 0), 6.0) == [Finished(0)]
    assert core.next_deadline() is None


def test_a_second_stop_hurries_and_the_deadline_kills() -> None:
    core = begun(2)
    core.handle(Stop(), 0.0)
    assert core.next_deadline() == DRAIN_S
    assert core.handle(Stop(), 1.0) == [Terminate(0), Terminate(1)]
    assert core.next_deadline() == 1.0 + HURRY_S
    assert core.handle(Tick(), 1.0 + HURRY_S) == [Kill(0), Kill(1)]


def test_stop_before_the_beginning() -> None:
    core = Supervision(2)
    assert core.handle(Stop(), 0.0) == [Finished(0)]
    assert core.handle(Begin(), 1.0) == []


class Machine(RuleBasedStateMachine):
    """The core against a model of the processes that it starts and signals."""

    @initialize(workers=st.integers(1, 4))
    def begin(self, workers: int) -> None:
        self.core = Supervision(workers)
        self.now = 0.0
        self.running: set[int] = set()
        self.drained: set[int] = set()
        self.ready_told = 0
        self.finished = 0
        self.stopping = False
        self.carry_out(self.core.handle(Begin(), 0.0))

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(worker):
                    assert worker not in self.running
                    assert not self.stopping
                    assert worker not in self.drained
                    self.running.add(worker)
                case Terminate(worker) | Kill(worker):
                    assert worker in self.running
                    self.stopping = True
                case AllReady():
                    self.ready_told += 1
                case Finished():
                    assert not self.running
                    self.finished += 1

    @rule(worker=st.integers(0, 3))
    def becomes_ready(self, worker: int) -> None:
        if worker in self.running:
            self.carry_out(self.core.handle(BecameReady(worker), self.now))

    @rule(worker=st.integers(0, 3), code=st.sampled_from([0, 1, 2, -9]))
    def ends(self, worker: int, code: int) -> None:
        if worker in self.running:
            self.running.discard(worker)
            if code == 0:
                self.drained.add(worker)
            self.carry_out(self.core.handle(Exited(worker, code), self.now))

    @rule()
    def revived(self) -> None:
        if not self.stopping:
            self.drained.clear()
        self.carry_out(self.core.handle(Revive(), self.now))

    @rule(seconds=st.sampled_from([0.1, 1.0, 30.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.core.handle(Tick(), self.now))

    @precondition(lambda self: self.finished == 0)
    @rule()
    def stop(self) -> None:
        self.stopping = True
        self.carry_out(self.core.handle(Stop(), self.now))

    @invariant()
    def told_once(self) -> None:
        assert self.ready_told <= 1
        assert self.finished <= 1

    @invariant()
    def never_gives_up(self) -> None:
        """Something runs, or will be started, or all is finished, or drained."""
        assert self.running or self.core.next_deadline() is not None or self.finished or self.drained


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSupervision = Machine.TestCase
