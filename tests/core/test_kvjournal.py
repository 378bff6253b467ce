"""The worker's side: batches, digests, replays and snapshots."""

from __future__ import annotations

from typing import Any

from p2pdyn.core.kvjournal import KvJournal
from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored
from p2pdyn.wire.kvpack import (
    CLEARED,
    REMOVED,
    STORED,
    combine,
    hashes_of,
    unpack_ops,
    unpack_replay,
    unpack_snapshot,
)


def journal(**limits: Any) -> KvJournal:
    return KvJournal("a" * 16, 7, 3, 1, **limits)


def store(*tokens: int, tier: int = 0) -> BlocksStored:
    """Sequences of one block of one token; the id is the token."""
    return BlocksStored(tokens[:1], None, tokens[:1], tier=tier)


def stores(count: int) -> BlocksStored:
    """One sequence of ``count`` blocks."""
    return BlocksStored(tuple(range(1, count + 1)), None, tuple(range(1, count + 1)))


def kinds(ops: bytes) -> list[tuple[int, int, int]]:
    return [(kind, tier, len(hashes_of(packed))) for kind, tier, packed in unpack_ops(ops)]


def test_a_step_is_one_batch_with_runs_of_alike_ops() -> None:
    worker = journal()
    steps = [
        worker.take([store(1), store(2), store(2, tier=1), BlocksRemoved((1,))]),
        worker.take([]),
        worker.take([store(3)]),
    ]

    assert [[(batch.worker, batch.epoch, batch.rank, batch.seq) for batch in step] for step in steps] == [
        [("a" * 16, 7, 3, 1)],
        [],
        [("a" * 16, 7, 3, 2)],
    ]
    assert kinds(steps[0][0].ops) == [(STORED, 0, 2), (STORED, 1, 1), (REMOVED, 0, 1)]


def test_what_comes_and_goes_by_turns_is_told_in_one_run_each() -> None:
    worker = journal()
    worker.take([store(1), store(2)])
    (turns,) = worker.take([store(3), BlocksRemoved((1,)), store(4), BlocksRemoved((2,)), store(5)])
    (back,) = worker.take([BlocksRemoved((3,)), store(6), store(3), BlocksRemoved((4,))])

    assert kinds(turns.ops) == [(REMOVED, 0, 2), (STORED, 0, 3)]
    assert kinds(back.ops) == [(REMOVED, 0, 1), (STORED, 0, 2), (REMOVED, 0, 1)], "one comes back"


def test_what_changes_nothing_is_not_told() -> None:
    worker = journal()
    assert worker.take([BlocksCleared(), BlocksRemoved((1,))]) == []
    worker.take([store(1)])
    before = worker.digest()

    assert worker.take([store(1), BlocksRemoved((1,)), BlocksRemoved((9,)), BlocksStored((5,), 99, (5,))]) == []
    after = worker.digest()
    assert (after.seq, after.blocks, after.xor) == (before.seq, before.blocks, before.xor)
    assert worker.orphans == 1


def test_clearing_undoes_what_its_step_did_before() -> None:
    worker = journal()
    worker.take([store(1)])
    (batch,) = worker.take([store(2), BlocksCleared(), store(3)])

    assert kinds(batch.ops) == [(CLEARED, 0, 0), (STORED, 0, 1)]
    assert worker.digest().blocks == 1


def test_digests_are_numbered_and_are_of_the_live_set() -> None:
    worker = journal()
    worker.take([store(1), store(2), store(2, tier=2)])
    xors = [0, 0, 0]
    for one, tier in worker.held():
        xors[tier] ^= one

    first, second = worker.digest(), worker.digest()
    assert (first.seq, first.number, first.blocks, first.xor) == (1, 1, 3, combine(xors))
    assert second.number == 2
    worker.take([BlocksRemoved((1, 2)), BlocksRemoved((2,), tier=2)])
    assert (worker.digest().blocks, worker.digest().xor) == (0, 0)
    worker.take([store(1), store(2, tier=1), store(3, tier=2)])
    worker.take([BlocksCleared()])
    assert (worker.digest().blocks, worker.digest().xor) == (0, 0)


def test_a_large_step_is_split_by_bytes_and_by_ops() -> None:
    worker = journal(max_ops=8 + 5 + 3 * 8, max_runs=2)
    by_bytes = worker.take([stores(7)])
    by_ops = worker.take([BlocksRemoved((1,)), store(100, tier=1), BlocksRemoved((2,)), BlocksRemoved((100,), tier=1)])

    assert [kinds(batch.ops) for batch in by_bytes] == [[(STORED, 0, 3)], [(STORED, 0, 3)], [(STORED, 0, 1)]]
    assert [batch.seq for batch in by_bytes + by_ops] == [1, 2, 3, 4, 5]
    assert all(len(batch.ops) <= 37 for batch in by_bytes + by_ops)
    runs = [run for batch in by_ops for run in unpack_ops(batch.ops)]
    told = [(kind, tier, one) for kind, tier, packed in runs for one in hashes_of(packed)]
    assert [entry[:2] for entry in told] == [(REMOVED, 0), (STORED, 1), (REMOVED, 0), (REMOVED, 1)]


def test_a_replay_has_the_batches_from_first_to_last() -> None:
    worker = journal()
    batches = [worker.take([store(token)])[0] for token in range(1, 4)]

    assert unpack_replay(worker.replay(7, 2) or b"") == (7, 2, [batch.ops for batch in batches[1:]])
    assert unpack_replay(worker.replay(7, 4) or b"") == (7, 4, [])
    assert [worker.replay(7, 0), worker.replay(7, 5), worker.replay(6, 1), worker.replay(8, 1)] == [None] * 4


def test_replays_are_bounded_in_bytes() -> None:
    worker = journal(replay_bytes=2 * 16)
    for token in range(1, 5):
        worker.take([store(token)])

    assert worker.replay(7, 2) is None
    assert len(unpack_replay(worker.replay(7, 3) or b"").batches) == 2
    worker.take([stores(9)])
    assert worker.replay(7, worker.seq) is None
    assert worker.replay(7, worker.seq + 1) is not None


def test_a_snapshot_is_the_live_set_at_its_seq() -> None:
    worker = journal()
    worker.take([stores(20_000), store(1, tier=1)])
    worker.take([BlocksRemoved((1,))])
    epoch, seq, runs = unpack_snapshot(worker.snapshot())

    assert (epoch, seq) == (7, 2)
    assert {(one, tier) for _, tier, packed in runs for one in hashes_of(packed)} == worker.held()
    assert sum(len(hashes_of(packed)) for _, _, packed in runs) == 20_000


def test_a_raised_epoch_keeps_the_cache_and_begins_to_count_again() -> None:
    worker = journal()
    worker.take([store(1)])
    worker.raise_epoch(9)
    worker.raise_epoch(8)

    digest = worker.digest()
    assert (digest.epoch, digest.seq, digest.number, digest.blocks) == (9, 0, 1, 1)
    assert worker.replay(7, 1) is None
    assert worker.replay(9, 1) is not None
    assert worker.replay(9, 0) is None  # the ring of the epoch before is gone
    (batch,) = worker.take([BlocksRemoved((1,))])
    assert (batch.epoch, batch.seq) == (9, 1)
