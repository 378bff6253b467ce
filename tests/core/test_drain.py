"""When a draining node asks what of whom, and what its frontends do with streams that are to move."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pdyn.core.drain import (
    FINISH_S,
    LIMIT_S,
    MOVE_S,
    Action,
    Begin,
    Drain,
    DrainWorkers,
    End,
    HurryWorkers,
    Leave,
    Move,
    Open,
    Refuse,
    Seen,
    Signal,
    last_of,
)
from p2pdyn.core.types import AGGREGATED, DECODE, DRAINING, PREFILL, READY, NodeId, PeerInfo, ServedModel

A, B = (NodeId(letter * 16) for letter in "ab")


def drain(at: float = 0.0) -> Drain:
    core = Drain()
    assert core.handle(Begin(), at) == [Refuse()]
    return core


def test_a_node_with_nothing_open_leaves_at_once() -> None:
    core = drain()
    assert core.handle(Seen(Open()), 0.1) == [DrainWorkers(), Leave()]
    assert core.state == "left"
    assert core.handle(Seen(Open()), 0.2) == []


def test_streams_finish_then_are_asked_to_move_again_and_again_then_end() -> None:
    core = drain()
    assert core.handle(Seen(Open(streams=2)), 0.1) == [DrainWorkers()]
    assert core.handle(Seen(Open(streams=2)), FINISH_S - 0.1) == []
    assert core.handle(Seen(Open(streams=2)), FINISH_S) == [Move()]
    assert core.handle(Seen(Open(streams=1)), FINISH_S + MOVE_S / 2) == []
    assert core.handle(Seen(Open(streams=1)), FINISH_S + MOVE_S) == [Move()]
    assert core.left_s(FINISH_S) == LIMIT_S - FINISH_S
    assert core.handle(Seen(Open(streams=1)), LIMIT_S) == [End(), HurryWorkers(), Leave()]


def test_leases_and_answers_are_waited_for_too() -> None:
    core = drain()
    core.handle(Seen(Open(leases=1)), 0.1)
    assert core.state == "finishing"
    core.handle(Seen(Open(answers=1)), 0.2)
    assert core.state == "finishing"
    assert core.handle(Seen(Open()), 0.3) == [Leave()]


def test_supervised_workers_drain_when_the_answers_have_ended() -> None:
    core = drain()
    assert core.handle(Seen(Open(answers=1, workers=2)), 0.1) == []
    assert core.handle(Seen(Open(workers=2)), 0.2) == [DrainWorkers()]
    assert core.handle(Seen(Open(workers=1)), 0.3) == []
    assert core.handle(Seen(Open()), 0.4) == [Leave()]


def test_supervised_workers_wait_for_the_answers_for_so_long_only() -> None:
    core = drain()
    assert core.handle(Seen(Open(answers=1, workers=1)), FINISH_S) == [DrainWorkers(), Move()]


def test_asking_again_changes_nothing() -> None:
    core = drain(5.0)
    assert core.handle(Begin(), 6.0) == []
    assert core.handle(Seen(Open(streams=1)), 5.0 + FINISH_S) == [DrainWorkers(), Move()]
    assert core.handle(Begin(), 90.0) == []


def test_the_second_signal_ends_it_and_what_can_still_moves() -> None:
    core = Drain()
    assert core.handle(Signal(), 0.0) == [Refuse()]
    core.handle(Seen(Open(streams=1)), 0.1)
    assert core.handle(Signal(), 0.2) == [Move(), HurryWorkers(), Leave()]


def test_the_first_signal_after_the_command_is_no_second_one() -> None:
    core = drain()
    assert core.handle(Signal(), 1.0) == []
    assert core.handle(Signal(), 2.0) == [Move(), HurryWorkers(), Leave()]


class Machine(RuleBasedStateMachine):
    """Whatever comes in whatever order: a drain ends, within its limit, once, and refuses first of all."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Drain()
        self.now = self.began = 0.0
        self.said: list[Action] = []
        self.open = Open()

    def take(self, actions: list[Action]) -> None:
        assert not (self.said and Leave() in self.said and actions), "nothing comes after the end"
        self.said += actions

    @rule(again=st.booleans())
    def asked(self, again: bool) -> None:
        if not self.core.begun:
            self.began = self.now
        self.take(self.core.handle(Signal() if again else Begin(), self.now))

    @rule(open_=st.builds(Open, *[st.integers(0, 2)] * 4), seconds=st.sampled_from([0.0, 0.1, 1.0, 19.0, 61.0]))
    def time_passes(self, open_: Open, seconds: float) -> None:
        self.now += seconds
        self.open = open_
        self.take(self.core.handle(Seen(open_), self.now))

    @precondition(lambda self: self.core.begun and not any(self.open))
    @rule()
    def nothing_is_open(self) -> None:
        self.take(self.core.handle(Seen(Open()), self.now))
        assert self.core.state == "left"

    @invariant()
    def order(self) -> None:
        assert self.core.begun == bool(self.said)
        assert not self.said or self.said[0] == Refuse()
        for once in (Refuse(), DrainWorkers(), HurryWorkers(), End(), Leave()):
            assert self.said.count(once) <= 1
        assert (self.core.state == "left") == (Leave() in self.said)

    @invariant()
    def never_late(self) -> None:
        self.take(self.core.handle(Seen(self.open), self.now))
        assert not self.core.begun or self.core.state == "left" or self.now < self.began + LIMIT_S


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestDrain = Machine.TestCase


def worker(*models: str, state: str = READY, role: str = AGGREGATED, fingerprint: str = "f") -> PeerInfo:
    served = tuple(ServedModel(model, "c", fingerprint, 16, 1024) for model in models)
    return PeerInfo("w", "1", role, state=state, models=served)


def test_the_last_ready_worker_of_a_model() -> None:
    both = worker("one", "two")
    assert last_of({A}, [(A, both)]) == ("one", "two")
    assert last_of({A}, [(A, both), (B, worker("one"))]) == ("two",)
    assert last_of({A, B}, [(A, both), (B, both)]) == ("one", "two")
    assert last_of({A}, [(A, both), (B, both)]) == ()


def test_who_cannot_stand_in_for_it() -> None:
    for other in (
        worker("m", state=DRAINING),
        worker("m", role=PREFILL),
        worker("m", fingerprint="g"),
        PeerInfo("f", "1", state=READY),
    ):
        assert last_of({A}, [(A, worker("m")), (B, other)]) == ("m",)
    assert last_of({A}, [(A, worker("m")), (B, worker("m", role=DECODE))]) == ()


def test_who_is_not_missed() -> None:
    for own in (worker("m", state=DRAINING), worker("m", role=PREFILL), PeerInfo("f", "1", state=READY)):
        assert last_of({A}, [(A, own)]) == ()
