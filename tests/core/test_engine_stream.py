"""An engine's stream, without epoch or snapshot: what is believed is what the engine has, or less and said so."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pdyn.core import engine_stream
from p2pdyn.core.engine_stream import Action, Apply, Ask, Clear, EngineStream

Message = tuple[int, bytes]


@dataclass
class Publisher:
    """An engine: each message stores or removes one block, or clears all. Keeps the last ``keep`` messages."""

    name: int
    keep: int
    seq: int = 0
    blocks: set[int] = field(default_factory=set)
    kept: list[Message] = field(default_factory=list)

    def publish(self, op: str) -> Message:
        kind, block = op[0], int(op[1:] or 0)
        if kind == "+":
            self.blocks.add(block)
        elif kind == "-":
            self.blocks.discard(block)
        else:
            self.blocks.clear()
        message = (self.seq, f"{self.name}/{self.seq}/{op}".encode())
        self.seq += 1
        self.kept = [*self.kept, message][-self.keep :] if self.keep else []
        return message

    def replay(self, first: int) -> list[Message]:
        return [message for message in self.kept if message[0] >= first]


class Follower:
    """Carries a cursor's actions out, on a set of blocks. ``question`` is the open replay, if any."""

    def __init__(self) -> None:
        self.cursor = EngineStream()
        self.blocks: set[int] = set()
        self.question: Ask | None = None
        self.cleared = 0

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Ask):
                self.question = action
            elif isinstance(action, Clear):
                self.cleared += 1
                self.blocks.clear()
            else:
                self._apply(action)
        if not self.cursor.asking:
            self.question = None

    def _apply(self, action: Apply) -> None:
        op = action.payload.decode().rpartition("/")[2]
        if op[0] == "+":
            self.blocks.add(int(op[1:]))
        elif op[0] == "-":
            self.blocks.discard(int(op[1:]))
        else:
            self.blocks.clear()
            self.cursor.decoded(True)

    def live(self, message: Message) -> None:
        self.do(self.cursor.message(*message, hash(message[1])))

    def connect(self) -> None:
        self.do(self.cursor.connected())

    @property
    def asked(self) -> int | None:
        return None if self.question is None else self.question.first

    def answer(self, publisher: Publisher) -> None:
        """The whole replay that is asked for, and END; or until another one is asked for."""
        question = self.question
        assert question is not None
        for message in publisher.replay(question.first):
            self.do(self.cursor.replayed(*message, hash(message[1])))
            if self.question is not question:
                return
        self.do(self.cursor.replay_ended())

    def settle(self, publisher: Publisher) -> None:
        for _ in range(20):
            if self.asked is None:
                return
            self.answer(publisher)
        pytest.fail("it asks for replays for ever")


def started(keep: int = 100) -> tuple[Publisher, Follower]:
    publisher, follower = Publisher(1, keep), Follower()
    follower.connect()
    follower.settle(publisher)
    return publisher, follower


def test_messages_in_order_are_applied_at_once() -> None:
    publisher, follower = started()
    for op in ("+1", "+2", "-1"):
        follower.live(publisher.publish(op))
        assert follower.blocks == publisher.blocks
    assert (follower.cursor.state, follower.asked, follower.cleared) == ("exact", None, 0)


def test_a_first_message_beyond_0_has_the_replay_begin_at_0() -> None:
    publisher, follower = started()
    publisher.publish("+1")
    follower.live(publisher.publish("+2"))
    assert (follower.asked, follower.cursor.state, follower.blocks) == (0, "replaying", set())
    follower.answer(publisher)
    assert (follower.cursor.state, follower.blocks) == ("exact", {1, 2})


def test_a_gap_is_replayed_from_the_last_known_and_live_messages_wait() -> None:
    publisher, follower = started()
    follower.live(publisher.publish("+1"))
    publisher.publish("+2")
    follower.live(publisher.publish("+3"))
    assert follower.asked == 0
    follower.live(publisher.publish("-1"))
    assert follower.blocks == {1}
    follower.answer(publisher)
    assert (follower.cursor.state, follower.blocks, follower.cleared) == ("exact", {2, 3}, 0)


def test_a_replay_that_runs_ahead_of_the_live_stream_is_no_restart() -> None:
    publisher, follower = started()
    follower.live(publisher.publish("+0"))
    late = [publisher.publish(f"+{block}") for block in range(1, 5)]
    follower.do(follower.cursor.probe())
    follower.answer(publisher)
    for message in late:
        follower.live(message)
    follower.live(publisher.publish("-1"))
    assert (follower.cursor.state, follower.blocks, follower.cursor.restarts) == ("exact", {0, 2, 3, 4}, 0)


@pytest.mark.parametrize("published", [1, 2, 3, 8])
def test_a_publisher_that_restarted_is_noticed_wherever_it_counts(published: int) -> None:
    publisher, follower = started()
    for block in (1, 2, 3):
        follower.live(publisher.publish(f"+{block}"))
    follower.cursor.disconnected()
    publisher = Publisher(2, 100)
    for block in range(10, 10 + published):
        publisher.publish(f"+{block}")
    follower.connect()
    follower.settle(publisher)
    assert (follower.cursor.state, follower.blocks) == ("exact", publisher.blocks)
    follower.live(publisher.publish("-10"))
    assert follower.blocks == publisher.blocks


def test_nothing_is_applied_after_a_new_connection_before_it_is_known_whose_it_is() -> None:
    publisher, follower = started()
    for block in (1, 2, 3):
        follower.live(publisher.publish(f"+{block}"))
    follower.cursor.disconnected()
    publisher = Publisher(2, 100)
    for block in (11, 12, 13):
        publisher.publish(f"+{block}")
    follower.connect()
    follower.live(publisher.publish("+14"))  # just the seq that the old one would have had next
    assert follower.blocks == {1, 2, 3}
    follower.settle(publisher)
    assert (follower.cursor.state, follower.blocks) == ("exact", {11, 12, 13, 14})


def test_a_replay_that_fits_but_cannot_show_whose_it_is_counts_as_lost() -> None:
    publisher, follower = started()
    for block in (1, 2, 3):
        follower.live(publisher.publish(f"+{block}"))
    follower.cursor.disconnected()
    publisher = Publisher(2, 2)
    for block in range(11, 16):
        publisher.publish(f"+{block}")
    follower.connect()
    follower.settle(publisher)
    assert (follower.cursor.state, follower.blocks) == ("degraded", {14, 15})


def test_a_replay_asked_for_before_the_gap_does_not_count_it_as_lost() -> None:
    publisher, follower = started()
    follower.live(publisher.publish("+1"))
    follower.do(follower.cursor.probe())
    answers = publisher.replay(0)
    publisher.publish("+2")
    follower.live(publisher.publish("+3"))
    for message in answers:
        follower.do(follower.cursor.replayed(*message, hash(message[1])))
    follower.do(follower.cursor.replay_ended())
    follower.settle(publisher)
    assert (follower.cursor.state, follower.blocks, follower.cursor.lost) == ("exact", {1, 2, 3}, 0)


def test_seq_0_again_is_a_new_publisher_even_without_a_connection_told() -> None:
    publisher, follower = started()
    for block in (1, 2):
        follower.live(publisher.publish(f"+{block}"))
    publisher = Publisher(2, 100)
    follower.live(publisher.publish("+9"))
    assert (follower.blocks, follower.cursor.state, follower.cleared) == ({9}, "exact", 1)
    follower.live(publisher.publish("+8"))
    assert follower.blocks == {8, 9}


def test_a_buffer_too_short_clears_says_so_and_goes_on() -> None:
    publisher, follower = started(keep=2)
    follower.live(publisher.publish("+1"))
    for op in ("+2", "-1", "+3"):
        publisher.publish(op)
    follower.live(publisher.publish("+4"))
    follower.settle(publisher)
    assert (follower.cursor.state, follower.blocks, follower.cleared) == ("degraded", {3, 4}, 1)
    assert "no longer has the events that were missed" in follower.cursor.degraded
    follower.live(publisher.publish("*"))
    assert (follower.cursor.state, follower.cursor.degraded) == ("exact", "")


def test_a_seq_that_was_never_sent_is_lost_and_not_asked_for_for_ever() -> None:
    publisher, follower = started()
    follower.live(publisher.publish("+1"))
    publisher.publish("+2")
    del publisher.kept[-1]
    follower.live(publisher.publish("+3"))
    follower.settle(publisher)
    assert (follower.cursor.state, follower.blocks, follower.cursor.lost) == ("degraded", {3}, 1)


@pytest.mark.parametrize("keep", [0, 100])
def test_without_a_replay_a_gap_costs_what_is_known_and_no_more(keep: int) -> None:
    publisher, follower = started(keep)
    follower.live(publisher.publish("+1"))
    publisher.publish("-1")
    follower.live(publisher.publish("+3"))
    if keep:
        follower.do(follower.cursor.replay_failed())
    else:
        follower.settle(publisher)
    assert (follower.cursor.state, follower.blocks) == ("degraded", {3})
    follower.live(publisher.publish("+4"))
    assert follower.blocks == {3, 4}


def test_a_failed_probe_costs_nothing() -> None:
    publisher, follower = started()
    follower.live(publisher.publish("+1"))
    follower.do(follower.cursor.probe())
    follower.do(follower.cursor.replay_failed())
    assert (follower.cursor.state, follower.blocks) == ("exact", {1})


def test_what_waits_is_bounded_and_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_stream, "MAX_HELD", 3)
    publisher, follower = started()
    publisher.publish("+0")
    for block in range(1, 9):
        follower.live(publisher.publish(f"+{block}"))
    follower.settle(publisher)
    assert (follower.cursor.state, follower.blocks) == ("exact", set(range(9)))


def test_unreadable_bytes_are_told_until_the_cache_is_reset() -> None:
    publisher, follower = started()
    follower.live(publisher.publish("+1"))
    follower.cursor.decoded(False)
    assert "could not be read" in follower.cursor.degraded
    follower.live(publisher.publish("*"))
    assert follower.cursor.state == "exact"


class Streams(RuleBasedStateMachine):
    """A publisher with a short buffer, a live queue that loses, replays that lose and stall, restarts."""

    @initialize(keep=st.sampled_from([0, 1, 3, 8, 1000]))
    def start(self, keep: int) -> None:
        self.publisher, self.follower = Publisher(0, keep), Follower()
        self.wire: list[Message] = []
        self.answers: list[Message | None] = []
        self.answering: Ask | None = None
        self.lossy = False
        self.connected = True
        self.follower.connect()

    @rule(ops=st.lists(st.sampled_from(["+1", "+2", "+3", "-1", "-2", "-3", "*"]), min_size=1, max_size=5))
    def publish(self, ops: list[str]) -> None:
        for op in ops:
            message = self.publisher.publish(op)
            if self.connected:
                self.wire.append(message)

    @precondition(lambda self: self.wire)
    @rule(lose=st.booleans())
    def deliver(self, lose: bool) -> None:
        message = self.wire.pop(0)
        if not lose:
            self.follower.live(message)
            self.replaced()

    @precondition(lambda self: self.follower.asked is not None and self.answering is None)
    @rule()
    def serve(self) -> None:
        """The publisher looks at its replay socket."""
        assert self.follower.question is not None
        self.answering = self.follower.question
        self.answers = [*self.publisher.replay(self.answering.first), None]

    @precondition(lambda self: self.answers)
    @rule(lose=st.booleans(), count=st.integers(1, 4))
    def answer(self, lose: bool, count: int) -> None:
        for _ in range(min(count, len(self.answers))):
            message = self.answers.pop(0)
            if lose:
                self.lossy = True
            elif message is None:
                self.follower.do(self.follower.cursor.replay_ended())
            else:
                self.follower.do(self.follower.cursor.replayed(*message, hash(message[1])))
            self.replaced()

    @precondition(lambda self: self.follower.asked is not None and not self.answers)
    @rule()
    def stall(self) -> None:
        self.follower.do(self.follower.cursor.replay_stalled())
        self.replaced()

    @rule()
    def probe(self) -> None:
        self.follower.do(self.follower.cursor.probe())

    @rule(restart=st.booleans(), keep=st.sampled_from([0, 1, 3, 8, 1000]))
    def lose_connection(self, restart: bool, keep: int) -> None:
        self.wire.clear()
        self.connected = False
        self.follower.cursor.disconnected()
        self.follower.question = None
        self.replaced()
        if restart:
            self.publisher = Publisher(self.publisher.name + 1, keep)

    @precondition(lambda self: not self.connected)
    @rule()
    def connect(self) -> None:
        self.connected = True
        self.follower.connect()
        self.replaced()

    def replaced(self) -> None:
        """A new question drops the answers to the one before."""
        if self.answering is not self.follower.question:
            self.answering, self.answers = None, []

    @invariant()
    def exact_is_right_up_to_what_was_seen(self) -> None:
        cursor = self.follower.cursor
        if self.connected and not self.wire and cursor.state == "exact" and cursor.next == self.publisher.seq:
            assert self.follower.blocks == self.publisher.blocks

    def teardown(self) -> None:
        if not hasattr(self, "publisher"):
            return
        if not self.connected:
            self.connect()
        for message in self.wire:
            self.follower.live(message)
        self.follower.settle(self.publisher)
        self.follower.do(self.follower.cursor.probe())
        self.follower.settle(self.publisher)
        cursor = self.follower.cursor
        if cursor.degraded:
            assert self.follower.blocks <= self.publisher.blocks
            assert self.publisher.keep < 1000 or self.lossy
        elif self.publisher.keep:
            assert cursor.state == "exact"
            assert cursor.next == self.publisher.seq
            assert self.follower.blocks == self.publisher.blocks
        else:  # without a buffer the last messages are lost unseen
            assert cursor.next <= self.publisher.seq


Streams.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestStreams = Streams.TestCase
