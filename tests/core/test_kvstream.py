"""One stream, cell by cell of the table in docs/design/kv-events.md: each input in each state."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pdyn.core import kvstream
from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.kvjournal import KvJournal
from p2pdyn.core.kvsignals import Fetch, Fetched, FetchFailed, Lost, Tick, Up
from p2pdyn.core.kvstream import (
    DEGRADED,
    EXACT,
    FETCH_RETRY_MAX_S,
    FETCH_RETRY_S,
    FULL_RETRY_S,
    GAP,
    NEW,
    REPLAYING,
    STALE_S,
    Event,
    KvStream,
)
from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.events import KvBatch, KvDigest
from p2pdyn.wire.schema import EVENTS

EPOCH = 5
STATES = (NEW, REPLAYING, EXACT, GAP, DEGRADED)
BASED = STATES[1:]
"""States with a snapshot."""


class Pair:
    """A worker with two blocks in batch 1, and a stream on it, in ``state``."""

    def __init__(self, state: str = EXACT, **limits: Any) -> None:
        self.now = 100.0
        self.worker = KvJournal("a" * 16, EPOCH, 3, 1)
        self.index = KvIndex()
        self.stream = KvStream(self.index, 3, **limits)
        self.missed: list[KvBatch] = []
        self.asked: list[Fetch] = []
        self.step(1, 2)
        (self.fetch,) = self.do(Up())
        if state == NEW:
            return
        self.answer()
        if state != REPLAYING:
            self.do(self.worker.digest())
        if state == GAP:
            self.missed = self.step(3)
            (self.fetch,) = self.do(self.worker.digest())
        if state == DEGRADED:
            (self.fetch,) = self.do(self.bad_digest())
        assert self.stream.state == state

    def do(self, event: Event) -> list[Fetch]:
        if isinstance(event, KvBatch) and self.stream.take(encode(event)):
            return []
        fetches = self.stream.handle(event, self.now)
        self.asked += fetches
        return fetches

    def wait(self, seconds: float) -> list[Fetch]:
        self.now += seconds
        return self.do(Tick())

    def step(self, *tokens: int) -> list[KvBatch]:
        """The batch of a step that stores blocks of one token each."""
        return self.take(*[BlocksStored((token,), None, (token,)) for token in tokens])

    def take(self, *events: KvEvent) -> list[KvBatch]:
        return self.worker.take(events)

    def bad_digest(self) -> KvDigest:
        return replace(self.worker.digest(), xor=1)

    def answer(self) -> list[Fetch]:
        """The worker answers the open fetch."""
        if self.fetch.what == "kv-snapshot":
            return self.do(Fetched(self.fetch.ticket, self.worker.snapshot()))
        _, epoch, first = map(int, self.fetch.key.split(":"))
        return self.do(Fetched(self.fetch.ticket, self.worker.replay(epoch, first)))

    def settle(self) -> None:
        """Half a minute in which every fetch is answered and each second has its digest."""
        for _ in range(30):
            self.wait(1.0)
            while self.asked:
                self.fetch = self.asked.pop()
                self.answer()
            self.do(self.worker.digest())

    def right(self) -> bool:
        """What the index has of the target is what the worker holds."""
        slot = self.stream.slot
        return slot is not None and self.index.held(slot) == self.worker.held()

    def told(self) -> tuple[str, int]:
        return self.stream.state, self.stream.seq


def snapshot(ticket: int) -> Fetch:
    return Fetch(ticket, "kv-snapshot", "3")


def replay(ticket: int, first: int) -> Fetch:
    return Fetch(ticket, "kv-replay", f"3:{EPOCH}:{first}")


# The worker is there, or not


def test_before_it_is_up_nothing_is_asked_for_and_nothing_believed() -> None:
    pair = Pair(NEW)
    stream = KvStream(pair.index, 3)

    assert [stream.handle(event, 1.0) for event in (Tick(), *pair.step(7), pair.worker.digest())] == [[], [], []]
    assert (stream.state, stream.slot, stream.blocks, stream.next_deadline()) == (NEW, None, 0, None)
    assert "not connected" in stream.why


def test_up_asks_for_a_snapshot() -> None:
    pair = Pair(NEW)

    assert pair.fetch == snapshot(1)
    assert pair.told() == (NEW, 0)
    assert pair.do(Up()) == []


@pytest.mark.parametrize("state", STATES)
def test_lost_takes_the_blocks_away_at_once(state: str) -> None:
    pair = Pair(state)
    slots = pair.index.live
    prompt = [one for one, _ in pair.worker.held()]

    assert pair.do(Lost()) == []
    assert pair.told() == (NEW, 0)
    assert pair.stream.slot is None
    assert pair.index.match(prompt[:1], slots).blocks == {}
    assert pair.stream.next_deadline() is None
    assert pair.answer() == []
    assert pair.wait(10) == []
    assert pair.do(Up()) == [snapshot(pair.fetch.ticket + 1)]


# Batches


@pytest.mark.parametrize("state", STATES)
def test_a_batch_of_an_older_epoch_is_ignored(state: str) -> None:
    pair = Pair(state)
    pair.do(pair.step(8)[0]._replace(epoch=EPOCH, seq=1))
    before = pair.told()
    late = pair.step(9)[0]._replace(epoch=EPOCH - 1)

    assert pair.do(late) == []
    assert pair.told() == before
    assert pair.stream.counters.ignored >= 1


@pytest.mark.parametrize("state", BASED)
def test_a_batch_that_was_applied_is_ignored(state: str) -> None:
    pair = Pair(state)
    ops = pair.step(9)[0].ops

    assert pair.do(KvBatch("a" * 16, EPOCH, 3, 1, ops)) == []
    assert pair.told() == (state, 1)
    assert pair.stream.blocks == 2


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("by", ["batch", "digest"])
def test_a_newer_epoch_takes_the_blocks_away_and_begins_anew(state: str, by: str) -> None:
    pair = Pair(state)
    old = pair.fetch
    pair.worker.raise_epoch(EPOCH + 1)
    first = pair.step(9)[0]

    fetches = pair.do(first if by == "batch" else pair.worker.digest())
    if state == NEW:  # nothing of another epoch was known: the snapshot under way serves
        assert fetches == []
        pair.answer()
    else:
        assert fetches == [snapshot(old.ticket + 1)]
        assert pair.told() == (NEW, 0)
        assert pair.stream.slot is None
        assert pair.answer() == []
        (pair.fetch,) = fetches
        pair.answer()
    assert pair.told() == (REPLAYING, 1)
    assert pair.right()


@pytest.mark.parametrize("state", [REPLAYING, EXACT, DEGRADED])
def test_the_next_batch_is_applied(state: str) -> None:
    pair = Pair(state)

    assert pair.do(pair.step(3)[0]) == []
    assert pair.told() == (state, 2)
    assert pair.right()


@pytest.mark.parametrize("state", [REPLAYING, EXACT])
def test_a_batch_further_ahead_is_kept_and_what_is_missing_asked_for(state: str) -> None:
    pair = Pair(state)
    pair.step(3)

    assert pair.do(pair.step(4)[0]) == [replay(2, 2)]
    assert pair.told() == (GAP, 1)
    assert "2" in pair.stream.why
    assert pair.do(pair.step(5)[0]) == []
    (pair.fetch,) = [replay(2, 2)]
    pair.answer()
    assert pair.told() == (REPLAYING, 4)
    assert pair.right()


def test_a_batch_that_comes_late_after_all_closes_the_gap() -> None:
    pair = Pair(EXACT)
    late, ahead = pair.step(3)[0], pair.step(4)[0]
    pair.do(ahead)

    assert pair.do(late) == []
    assert pair.told() == (REPLAYING, 3)
    assert pair.right()
    pair.do(pair.worker.digest())
    assert pair.stream.state == REPLAYING  # the replay that was asked for is still open
    pair.fetch = replay(2, 2)
    pair.answer()
    pair.do(pair.worker.digest())
    assert pair.stream.state == EXACT


def test_batches_before_the_first_snapshot_are_kept() -> None:
    pair = Pair(NEW)
    early = pair.worker.snapshot()
    for batch in (*pair.step(3), *pair.step(4)):
        assert pair.do(batch) == []
    pair.do(Fetched(1, early))

    assert pair.told() == (REPLAYING, 3)
    assert pair.right()


def test_a_malformed_batch_is_followed_by_a_snapshot() -> None:
    pair = Pair(EXACT)

    assert pair.do(pair.step(3)[0]._replace(ops=b"\xff")) == [snapshot(2)]
    assert pair.told() == (DEGRADED, 2)
    assert "malformed" in pair.stream.why
    assert (pair.stream.counters.malformed, pair.stream.counters.ignored) == (1, 0)


CLEAR = bytes(8) + b"\x20\0\0\0\0"
STORE = b"\0\x01\0\0\0" + bytes(8)


def few(removed: int, stored: int, hashes: int) -> bytes:
    """Ops that say so of blocks 100, 101, ..."""
    return struct.pack(f"<II{hashes}Q", removed, stored, *range(100, 100 + hashes))


@pytest.mark.parametrize("state", STATES)
def test_the_short_way_takes_the_next_batch_of_a_calm_stream(state: str) -> None:
    pair = Pair(state)
    pair.do(pair.step(8)[0])
    batch = pair.take(BlocksRemoved((1,)), BlocksStored((9,), None, (9,)))[0]
    before = pair.stream.seq, pair.stream.blocks, pair.stream.slot

    calm = state in (REPLAYING, EXACT)
    assert pair.stream.take(encode(batch)) is calm
    if calm:
        assert pair.told() == (state, 3)
        assert pair.right()
        pair.do(pair.worker.digest())
        assert pair.told() == (EXACT, 3)
    assert calm or (pair.stream.seq, pair.stream.blocks, pair.stream.slot) == before


@pytest.mark.parametrize("known", [True, False], ids=["after another", "first"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"worker": "b" * 16}, id="another worker"),
        pytest.param({"rank": 2}, id="another rank"),
        pytest.param({"seq": 2}, id="seen"),
        pytest.param({"seq": 4}, id="further ahead"),
        pytest.param({"epoch": EPOCH - 1}, id="older epoch"),
        pytest.param({"epoch": EPOCH + 1}, id="newer epoch"),
        pytest.param({"ops": CLEAR}, id="cleared"),
        pytest.param({"ops": few(0, 0, 0) + STORE + CLEAR + STORE}, id="cleared in between"),
        pytest.param({"ops": few(0, 1, 1) + STORE}, id="another op"),
        pytest.param({"ops": few(0, 1, 1) + b"x"}, id="a byte behind a store"),
        pytest.param({"ops": few(0, 1, 2)}, id="a hash behind a store"),
        pytest.param({"ops": few(2, 0, 1)}, id="fewer hashes than counted"),
        pytest.param({"ops": few(2**32 - 1, 2, 1)}, id="counts that only add up in 32 bits"),
        pytest.param({"ops": few(0, 4, 4)}, id="more than there is room for"),
        pytest.param({"ops": few(0, 0, 0)[:7]}, id="truncated"),
    ],
)
def test_the_short_way_leaves_the_rest_as_it_is(change: dict[str, Any], known: bool) -> None:
    pair = Pair(EXACT, max_blocks=6)
    if known:
        pair.do(pair.step(8)[0])
    told, slot, held = (*pair.told(), pair.stream.blocks), pair.stream.slot, pair.worker.held()

    assert not pair.stream.take(encode(pair.step(3)[0]._replace(**change)))
    assert (*pair.told(), pair.stream.blocks) == told
    assert pair.stream.slot == slot == 0
    assert pair.index.held(slot) == held


def test_the_short_way_ends_with_the_digest_that_it_rests_on() -> None:
    pair = Pair(EXACT)
    pair.do(pair.step(3)[0])
    pair.wait(STALE_S - 0.01)
    assert pair.stream.take(encode(pair.step(4)[0]))
    pair.wait(0.01)

    assert pair.stream.state == GAP
    assert not pair.stream.take(encode(pair.step(5)[0]))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=4),
    st.lists(st.integers(1, 9), max_size=4),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2),
    st.sampled_from((0, 0, -1, 8, -8)),
)
def test_the_short_way_does_what_the_long_one_does(
    gone: list[int], come: list[int], changes: list[tuple[int, int]], longer: int
) -> None:
    """To a message of ours or one that differs in a few bytes; what it takes decodes."""
    short, long = Pair(EXACT), Pair(EXACT)
    for pair in (short, long):
        pair.do(pair.step(*range(3, 8))[0])
    held = sorted(one for one, _ in short.worker.held())
    hashes = [held[one % len(held)] if one < 8 else one for one in gone + come]
    ops = struct.pack(f"<II{len(hashes)}Q", len(gone), len(come), *hashes)
    data = bytearray(encode(KvBatch("a" * 16, EPOCH, 3, 3, ops)))
    for at, value in changes:
        data[at % len(data)] = value
    sent = bytes(data) + bytes(longer) if longer >= 0 else bytes(data[:longer])
    taken = short.stream.take(sent)

    assert taken or changes or longer
    if taken:
        batch = decode(EVENTS, sent)
        assert isinstance(batch, KvBatch)
        long.stream.handle(batch, long.now)
    sides = [(pair.stream.seq, pair.stream.blocks, pair.index.held(0)) for pair in (short, long)]
    assert sides[0] == sides[1]
    digests = [pair.stream._base.digest() for pair in (short, long) if pair.stream._base]
    assert digests[0] == digests[1]


def test_a_large_batch_is_applied_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(EXACT)
    monkeypatch.setattr(kvstream, "SLICE", 2)
    large, after = pair.step(*range(3, 10))[0], pair.step(10)[0]

    assert pair.do(large) == []
    assert pair.told() == (REPLAYING, 1)
    assert "slices" in pair.stream.why
    assert pair.stream.blocks == 4
    assert pair.do(large) == []
    pair.do(replace(pair.bad_digest(), seq=1))
    assert pair.do(after) == []
    steps = 0
    while pair.stream.next_deadline() == 0.0:
        pair.do(Tick())
        steps += 1
        assert steps < 10
    assert pair.told() == (REPLAYING, 3)
    assert pair.right()
    pair.do(pair.worker.digest())
    assert pair.told() == (EXACT, 3)
    assert len(pair.asked) == 1  # the first snapshot: no half of a batch was compared with a digest


def test_a_snapshot_takes_the_place_of_half_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(DEGRADED)
    monkeypatch.setattr(kvstream, "SLICE", 2)
    pair.do(pair.step(*range(3, 12))[0])
    pair.answer()
    pair.settle()

    assert pair.told() == (EXACT, 2)
    assert pair.right()


def test_a_cleared_cache_takes_a_new_slot() -> None:
    pair = Pair(EXACT)
    pair.do(pair.take(BlocksStored((7,), None, (7,), tier=1), BlocksStored((8,), None, (8,), tier=2))[0])
    before = pair.stream.slot
    pair.do(pair.take(BlocksCleared(), BlocksStored((9,), None, (9,)))[0])

    assert pair.told() == (EXACT, 3)
    assert pair.stream.slot != before
    assert pair.right()
    pair.do(pair.worker.digest())
    assert pair.stream.state == EXACT


def test_a_cleared_cache_that_waited_for_what_was_missing_is_cleared() -> None:
    pair = Pair(EXACT)
    late, ahead = pair.step(3)[0], pair.take(BlocksCleared(), BlocksStored((9,), None, (9,)))[0]
    pair.do(ahead)
    pair.do(late)

    assert pair.told() == (REPLAYING, 3)
    assert pair.right()


# Digests


@pytest.mark.parametrize("state", [REPLAYING, EXACT])
def test_a_digest_ahead_tells_of_the_last_batch_that_was_lost(state: str) -> None:
    pair = Pair(state)
    pair.step(3)

    assert pair.do(pair.worker.digest()) == [replay(2, 2)]
    assert pair.told() == (GAP, 1)


@pytest.mark.parametrize("state", [REPLAYING, EXACT])
def test_an_equal_digest_makes_exact_for_two_periods(state: str) -> None:
    pair = Pair(state)
    pair.now += 1
    pair.do(pair.worker.digest())

    assert pair.told() == (EXACT, 1)
    assert pair.stream.why == ""
    assert pair.stream.next_deadline() == pair.now + STALE_S
    pair.wait(STALE_S - 0.01)
    assert pair.stream.state == EXACT
    assert pair.wait(0.01) == []
    assert pair.stream.state == GAP
    assert "digest" in pair.stream.why
    pair.do(pair.worker.digest())
    assert pair.stream.state == EXACT


@pytest.mark.parametrize("state", [GAP, DEGRADED])
def test_an_equal_digest_is_not_enough_while_a_fetch_is_open(state: str) -> None:
    pair = Pair(state)
    for batch in pair.missed:
        pair.do(batch)
    pair.do(pair.worker.digest())

    assert pair.right()
    assert pair.stream.state == REPLAYING
    pair.answer()
    pair.do(pair.worker.digest())
    assert pair.stream.state == EXACT


@pytest.mark.parametrize("state", [REPLAYING, EXACT])
def test_a_digest_that_differs_degrades_and_asks_for_a_snapshot(state: str) -> None:
    pair = Pair(state)
    pair.wait(FETCH_RETRY_S)

    assert pair.do(pair.bad_digest()) == [snapshot(2)]
    assert pair.told() == (DEGRADED, 1)
    assert "differs" in pair.stream.why
    assert pair.stream.counters.degraded == 1
    assert pair.right()  # the old blocks serve on


@pytest.mark.parametrize("state", BASED)
def test_a_digest_that_was_overtaken_says_nothing(state: str) -> None:
    pair = Pair(state)
    old = pair.worker.digest()
    for batch in (*pair.missed, *pair.step(7)):
        pair.do(batch)
    before = pair.told()

    assert pair.do(replace(old, number=old.number + 1, xor=1)) == []
    assert pair.told() == before


def test_a_digest_counts_once() -> None:
    """Else one that comes again and again would keep a stream exact that hears nothing new."""
    pair = Pair(EXACT)
    digest = pair.worker.digest()
    pair.do(digest)
    pair.wait(1.5)
    pair.do(digest)
    pair.wait(0.5)

    assert pair.stream.state == GAP


def test_a_worker_that_stays_behind_what_was_received_is_asked() -> None:
    """A batch that it never sent took the place of its next one."""
    pair = Pair(EXACT)
    pair.do(KvBatch("f" * 16, EPOCH, 3, 2, CLEAR))
    assert pair.do(pair.worker.digest()) == []
    pair.wait(STALE_S)
    assert pair.stream.state == GAP

    (pair.fetch,) = pair.do(pair.worker.digest())
    assert pair.fetch == snapshot(2)
    (pair.fetch,) = pair.answer()
    assert pair.fetch == replay(3, 2)
    pair.answer()
    pair.do(pair.worker.digest())
    assert pair.told() == (EXACT, 1)
    assert pair.right()


# Answers


def test_a_snapshot_replaces_and_only_a_digest_makes_exact() -> None:
    pair = Pair(DEGRADED)
    before = pair.stream.slot
    pair.answer()

    assert pair.told() == (REPLAYING, 1)
    assert pair.stream.slot != before
    assert pair.index.live.bit_count() == 1
    assert pair.right()
    pair.do(pair.worker.digest())
    assert pair.stream.state == EXACT


def test_a_snapshot_that_is_behind_is_followed_by_a_replay() -> None:
    pair = Pair(DEGRADED)
    early = pair.worker.snapshot()
    pair.do(pair.step(3)[0])

    assert pair.do(Fetched(pair.fetch.ticket, early)) == [replay(3, 2)]
    assert pair.told() == (GAP, 1)


def test_a_snapshot_is_applied_in_slices_and_then_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(DEGRADED)
    monkeypatch.setattr(kvstream, "SLICE", 2)
    old = pair.stream.slot
    pair.do(pair.step(*range(3, 8))[0])
    pair.answer()
    later = pair.step(8)[0]

    steps = 0
    while pair.stream.slot == old:
        assert pair.stream.state in (DEGRADED, GAP)
        assert pair.stream.next_deadline() == 0
        assert pair.do(Tick() if steps else later) == []
        steps += 1
        assert steps < 10
    pair.do(Tick())
    assert steps >= 3
    assert pair.told() == (REPLAYING, 3)
    assert pair.right()


def test_replays_that_are_not_kept_are_followed_by_a_snapshot() -> None:
    pair = Pair(GAP)

    assert pair.do(Fetched(pair.fetch.ticket, None)) == [snapshot(3)]
    assert pair.stream.state == GAP
    pair.fetch = snapshot(3)
    pair.answer()
    assert pair.told() == (REPLAYING, 2)
    assert pair.right()


@pytest.mark.parametrize("state", [NEW, GAP, DEGRADED])
@pytest.mark.parametrize("data", [b"", b"x" * 15, b"\0" * 21, b"\xff" * 64])
def test_a_malformed_answer_is_followed_by_a_snapshot_after_a_while(state: str, data: bytes) -> None:
    pair = Pair(state)
    assert pair.do(Fetched(pair.fetch.ticket, data)) == []
    assert pair.stream.state == state

    (pair.fetch,) = pair.wait(FETCH_RETRY_MAX_S)
    assert pair.fetch.what == "kv-snapshot"
    pair.answer()
    assert pair.stream.state == REPLAYING
    assert pair.right()


@pytest.mark.parametrize("state", [NEW, GAP, DEGRADED])
def test_a_failed_fetch_is_tried_again_ever_later(state: str) -> None:
    pair = Pair(state)
    waits = []
    for _ in range(8):
        assert pair.do(FetchFailed(pair.fetch.ticket)) == []
        due = pair.stream.next_deadline()
        assert due is not None
        waits.append(round(due - pair.now, 3))
        assert pair.wait(waits[-1] - 0.001) == []
        (pair.fetch,) = pair.wait(0.002)
    assert waits[0] in (FETCH_RETRY_S, 2 * FETCH_RETRY_S)
    assert waits[1] >= 2 * waits[0]
    assert waits[-1] == FETCH_RETRY_MAX_S
    assert pair.stream.counters.failed == 8


@pytest.mark.parametrize("state", STATES)
def test_answers_to_a_fetch_that_is_not_open_are_ignored(state: str) -> None:
    pair = Pair(state)
    before = pair.told()

    assert pair.do(Fetched(99, b"junk")) == []
    assert pair.do(FetchFailed(99)) == []
    assert pair.told() == before


def test_a_snapshot_of_an_older_epoch_is_asked_for_again() -> None:
    pair = Pair(NEW)
    old = pair.worker.snapshot()
    pair.worker.raise_epoch(EPOCH + 1)
    pair.do(pair.step(3)[0])
    pair.do(Fetched(1, old))

    assert pair.told() == (NEW, 0)
    assert pair.wait(FETCH_RETRY_MAX_S) == [snapshot(2)]


def test_a_number_far_ahead_costs_a_replay_and_no_more() -> None:
    pair = Pair(EXACT)
    (pair.fetch,) = pair.do(KvBatch("f" * 16, EPOCH, 3, 2**60, CLEAR))
    assert pair.fetch == replay(2, 2)
    pair.answer()

    assert pair.told() == (REPLAYING, 1)
    assert pair.wait(1) == []
    pair.do(pair.worker.digest())
    assert pair.stream.state == EXACT


def test_more_than_the_buffer_takes_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstream, "MAX_BUFFER", 3)
    pair = Pair(EXACT)
    pair.step(3)
    for token in range(4, 10):
        for fetch in pair.do(pair.step(token)[0]):
            pair.fetch = fetch
    pair.do(Fetched(pair.fetch.ticket, KvJournal("b", EPOCH, 3, 1).replay(EPOCH, 1)))
    pair.settle()

    assert pair.told() == (EXACT, 8)
    assert pair.right()


# Limits


def test_a_target_with_too_many_blocks_is_degraded_and_says_so() -> None:
    pair = Pair(EXACT, max_blocks=3)
    pair.do(pair.step(3, 4, 5)[0])

    assert pair.told() == (DEGRADED, 2)
    assert pair.stream.blocks == 3
    assert "room" in pair.stream.why
    (pair.fetch,) = [*pair.do(pair.worker.digest()), *pair.wait(FULL_RETRY_S), *pair.do(pair.worker.digest())]
    pair.answer()
    assert pair.do(pair.worker.digest()) == []
    assert pair.stream.state == DEGRADED
    pair.do(pair.take(BlocksRemoved((1, 2, 3, 4, 5)))[0])
    pair.do(pair.worker.digest())
    assert pair.told() == (EXACT, 3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STATES), st.binary(max_size=40), st.integers(0, 4)), max_size=6))
def test_random_bytes_raise_nothing(inputs: list[tuple[str, bytes, int]]) -> None:
    for state, data, ahead in inputs:
        pair = Pair(state)
        pair.do(KvBatch("f" * 16, EPOCH, 3, pair.stream.seq + ahead, data))
        pair.do(Fetched(pair.fetch.ticket, data))
        pair.do(Fetched(pair.fetch.ticket + 1, data))
        pair.settle()
        assert pair.stream.state == EXACT
        assert pair.right()
