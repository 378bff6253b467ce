"""Engine block ids to sequence hashes."""

from __future__ import annotations

import pytest
from support.kv import sequence_hash

from p2pdyn.core.kvblocks import KvBlocks
from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from p2pdyn.wire.kvpack import CLEARED, REMOVED, STORED

ONE, TWO = (1, 2), (1, 2, 3, 4)
A, B = sequence_hash(ONE), sequence_hash(TWO)

Told = list[tuple[int, int, list[int]]]


def tell(blocks: KvBlocks, *events: KvEvent) -> Told:
    return [(kind, tier, list(hashes)) for event in events for kind, tier, hashes in blocks.apply(event)]


@pytest.fixture
def blocks() -> KvBlocks:
    """Ids 10 and 11 hold the tokens 1 to 4."""
    known = KvBlocks(2)
    assert tell(known, BlocksStored((10, 11), None, TWO)) == [(STORED, 0, [A, B])]
    return known


def test_a_block_behind_a_known_one_continues_its_hash(blocks: KvBlocks) -> None:
    assert tell(blocks, BlocksStored((12,), 11, (5, 6))) == [(STORED, 0, [sequence_hash((*TWO, 5, 6))])]


def test_lora_and_salt_are_part_of_the_name(blocks: KvBlocks) -> None:
    salted = tell(blocks, BlocksStored((20,), None, ONE, salt="s"))

    assert salted == [(STORED, 0, [sequence_hash(ONE, "s")])]
    assert tell(blocks, BlocksStored((30,), None, ONE, lora="s")) not in ([(STORED, 0, [A])], salted)
    assert tell(blocks, BlocksStored((21,), 20, (3, 4))) == [(STORED, 0, [sequence_hash(TWO, "s")])]


def test_blocks_behind_an_unknown_one_are_left_out_with_all_behind_them(blocks: KvBlocks) -> None:
    orphans = BlocksStored((20, 21), 99, TWO), BlocksStored((22,), 21, (5, 6))

    assert tell(blocks, *orphans, BlocksRemoved((20, 21, 22))) == []
    assert blocks.orphans == 3
    assert len(blocks) == 2


@pytest.mark.parametrize(
    "event",
    [
        BlocksStored((20,), None, (1, 2, 3)),
        BlocksStored((20,), None, (1, 2**32)),
        BlocksStored((20,), None, (1, -1)),
        BlocksStored((20,), None, ONE, tier=3),
    ],
)
def test_what_cannot_be_is_left_out(blocks: KvBlocks, event: KvEvent) -> None:
    assert tell(blocks, event) == []
    assert blocks.orphans == 1


def test_two_copies_of_a_block_leave_with_the_second(blocks: KvBlocks) -> None:
    assert tell(blocks, BlocksStored((10,), None, ONE)) == []
    assert tell(blocks, BlocksRemoved((10,))) == []
    assert tell(blocks, BlocksRemoved((10,))) == [(REMOVED, 0, [A])]


def test_two_ids_of_one_content_leave_with_the_second(blocks: KvBlocks) -> None:
    assert tell(blocks, BlocksStored((20, 21), None, TWO)) == []
    assert tell(blocks, BlocksRemoved((10, 11))) == []
    assert tell(blocks, BlocksRemoved((21, 20))) == [(REMOVED, 0, [B, A])]


def test_tiers_are_apart(blocks: KvBlocks) -> None:
    assert tell(blocks, BlocksStored((10,), None, ONE, tier=2)) == [(STORED, 2, [A])]
    assert tell(blocks, BlocksRemoved((10,))) == [(REMOVED, 0, [A])]
    assert tell(blocks, BlocksStored((12,), 10, (7, 7))) == [(STORED, 0, [sequence_hash((*ONE, 7, 7))])]
    assert tell(blocks, BlocksRemoved((10,), tier=1)) == []
    assert tell(blocks, BlocksRemoved((10,), tier=2)) == [(REMOVED, 2, [A])]


def test_an_id_that_comes_with_other_content_names_that(blocks: KvBlocks) -> None:
    blocks.apply(BlocksStored((10,), None, ONE, tier=1))
    other = sequence_hash((9, 9))

    assert tell(blocks, BlocksStored((10,), None, (9, 9))) == [
        (REMOVED, 0, [A]),
        (REMOVED, 1, [A]),
        (STORED, 0, [other]),
    ]
    assert tell(blocks, BlocksRemoved((10,))) == [(REMOVED, 0, [other])]


def test_removing_what_is_not_there_is_nothing(blocks: KvBlocks) -> None:
    assert tell(blocks, BlocksRemoved((99,)), BlocksRemoved((10,), tier=7)) == []


def test_cleared_forgets_all_tiers_and_parents(blocks: KvBlocks) -> None:
    blocks.apply(BlocksStored((20,), None, (8, 8), tier=1))

    assert tell(blocks, BlocksCleared(), BlocksCleared()) == [(CLEARED, 0, [])]
    assert len(blocks) == 0
    assert tell(blocks, BlocksStored((12,), 11, (5, 6)), BlocksRemoved((20,), tier=1)) == []


def test_ids_are_bounded() -> None:
    blocks = KvBlocks(2, max_ids=2)

    assert tell(blocks, BlocksStored((1, 2, 3), None, (1, 2, 3, 4, 5, 6))) == [(STORED, 0, [A, B])]
    assert blocks.orphans == 1
    assert len(blocks) == 2
    tell(blocks, BlocksRemoved((1, 2, 3)))
    assert len(blocks) == 0
