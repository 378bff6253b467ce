"""Packed KV ops, replays and snapshots: what was packed comes back, and nothing else comes through."""

from __future__ import annotations

import struct
import tracemalloc
from array import array
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.events import MAX_OPS, KvBatch
from p2pdyn.wire.kvpack import (
    CLEARED,
    DEVICE,
    HOST,
    MAX_RUNS,
    REMOVED,
    STORED,
    Op,
    Run,
    combine,
    hashes_of,
    pack_ops,
    pack_replay,
    pack_snapshot,
    unpack_ops,
    unpack_replay,
    unpack_snapshot,
    xor_all,
    xor_packed,
)
from p2pdyn.wire.shape import WireError

U64 = st.integers(0, 2**64 - 1)
HASHES = st.lists(U64, min_size=1, max_size=5).map(lambda ids: array("Q", ids))
STORES = st.builds(Op, st.just(STORED), st.integers(0, 2), HASHES)
OPS = st.one_of(
    STORES,
    st.builds(Op, st.just(REMOVED), st.integers(0, 2), HASHES),
    st.just(Op(CLEARED, 0, array("Q"))),
)


def unpacked(runs: list[Run]) -> list[Op]:
    return [Op(kind, tier, array("Q", hashes_of(packed))) for kind, tier, packed in runs]


@given(st.lists(OPS, max_size=5))
def test_ops_come_back(ops: list[Op]) -> None:
    assert unpacked(unpack_ops(pack_ops(ops))) == ops


@given(U64, U64, st.lists(st.lists(OPS, min_size=1, max_size=3).map(pack_ops), max_size=4))
def test_a_replay_comes_back(epoch: int, first: int, batches: list[bytes]) -> None:
    assert unpack_replay(pack_replay(epoch, first, batches)) == (epoch, first, batches)


@given(U64, U64, st.lists(STORES, max_size=4))
def test_a_snapshot_comes_back(epoch: int, seq: int, ops: list[Op]) -> None:
    snapshot = unpack_snapshot(pack_snapshot(epoch, seq, ops))

    assert (snapshot.epoch, snapshot.seq, unpacked(snapshot.runs)) == (epoch, seq, ops)


def test_the_bytes_are_those_of_the_page() -> None:
    ops = [Op(STORED, HOST, array("Q", [1, 0x0102030405060708])), Op(CLEARED, 0, array("Q"))]

    others = bytes.fromhex("01 02000000 0100000000000000 0807060504030201 20 00000000")
    assert pack_ops(ops) == bytes(8) + others
    swap = [Op(REMOVED, DEVICE, array("Q", [3])), Op(STORED, DEVICE, array("Q", [4, 5]))]
    swapped = bytes.fromhex("01000000 02000000 0300000000000000 0400000000000000 0500000000000000")
    assert pack_ops(swap) == swapped
    assert pack_ops([*swap, *ops]) == swapped + others
    assert pack_ops(swap[1:]) == bytes.fromhex("00000000 02000000") + swapped[16:]
    assert pack_replay(2, 3, [pack_ops(ops[1:])]) == bytes.fromhex(
        "02" + 7 * "00" + "03" + 7 * "00" + "0d000000" + 8 * "00" + "2000000000"
    )
    assert pack_snapshot(2, 3, ops[:1]) == bytes.fromhex("02" + 7 * "00" + "03" + 7 * "00" + "01000000") + others[:-5]


@pytest.mark.parametrize(
    "data", [b"", bytes(7), b"\1" + bytes(7), bytes(4) + b"\1" + bytes(10), b"\xff" * 16, b"\1" + bytes(16)]
)
def test_an_odd_swap_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack_ops(data)


ONE = bytes(8)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x00", id="half a head"),
        pytest.param(b"\x00\x02\0\0\0" + ONE, id="fewer hashes than counted"),
        pytest.param(b"\x00\xff\xff\xff\xff" + ONE, id="a count for 32 GB"),
        pytest.param(b"\x00\x01\0\0\0" + ONE + b"x", id="a byte too many"),
        pytest.param(b"\x00\x00\0\0\0", id="stored nothing"),
        pytest.param(b"\x10\x00\0\0\0", id="removed nothing"),
        pytest.param(b"\x20\x01\0\0\0" + ONE, id="cleared something"),
        pytest.param(b"\x21\x00\0\0\0", id="cleared one tier"),
        pytest.param(b"\x03\x01\0\0\0" + ONE, id="unknown tier"),
        pytest.param(b"\x30\x01\0\0\0" + ONE, id="unknown kind"),
        pytest.param(b"\x20\0\0\0\0" * (MAX_RUNS + 1), id="too many ops"),
    ],
)
def test_odd_ops_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack_ops(bytes(8) + data)
    with pytest.raises(WireError):
        unpack_snapshot(bytes(16) + b"\x01\0\0\0" + data)


@pytest.mark.parametrize(
    "data", [b"", bytes(15), bytes(17), bytes(16) + b"\0\0\0\0", bytes(16) + b"\x07\0\0\0" + bytes(7)]
)
def test_odd_replays_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack_replay(data)


def test_a_snapshot_has_stored_ops_alone_and_as_many_as_it_says() -> None:
    removed = pack_ops([Op(REMOVED, 0, array("Q", [1]))])
    for data in (b"", bytes(19), bytes(16) + b"\x02\0\0\0" + removed, bytes(16) + b"\x01\0\0\0" + removed):
        with pytest.raises(WireError):
            unpack_snapshot(data)


@given(st.binary(max_size=64))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    for unpack in (unpack_ops, unpack_replay, unpack_snapshot):
        with suppress(WireError):
            unpack(data)


@pytest.mark.parametrize(
    "ops", [[Op(STORED, 0, array("Q", range(500_000)))], [Op(STORED, 0, array("Q", [1]))] * MAX_RUNS]
)
def test_unpacking_allocates_little(ops: list[Op]) -> None:
    data = pack_ops(ops)
    tracemalloc.start()
    try:
        unpack_ops(data)
        assert tracemalloc.get_traced_memory()[1] < 2.2 * len(data) + 300 * len(ops)
    finally:
        tracemalloc.stop()


@given(
    st.lists(U64, min_size=1, max_size=4, unique=True),
    st.sampled_from([(a, b) for a in range(3) for b in range(3) if a != b]),
)
def test_blocks_in_a_wrong_tier_show_in_the_digest(hashes: list[int], tiers: tuple[int, int]) -> None:
    """An even number of them too: with a constant a tier they would cancel."""
    total = 0
    for one in hashes:
        total ^= one
    sums = []
    for tier in tiers:
        xors = [0, 0, 0]
        xors[tier] = total
        sums.append(combine(xors))
    assert sums[0] != sums[1] or total in (0, 2**64 - 1, 0x5555555555555555, 0xAAAAAAAAAAAAAAAA)


def test_the_tiers_of_the_digest_are_rotated() -> None:
    assert [combine([one, 0, 0]) for one in (1, 2**63)] == [1, 1 << 63]
    assert [combine([0, one, 0]) for one in (1, 2**63)] == [1 << 21, 1 << 20]
    assert [combine([0, 0, one]) for one in (1, 2**63)] == [1 << 42, 1 << 41]
    assert combine([1, 2, 3]) == 1 ^ 2 << 21 ^ 3 << 42


@given(st.lists(U64, max_size=70))
def test_the_xor_of_many_is_that_of_one_after_the_other(hashes: list[int]) -> None:
    total = 0
    for one in hashes:
        total ^= one
    assert xor_all(array("Q", hashes)) == total


@given(st.lists(U64, max_size=300))
def test_packed_hashes_have_the_same_xor(hashes: list[int]) -> None:
    assert xor_packed(struct.pack(f"<{len(hashes)}Q", *hashes)) == xor_all(array("Q", hashes))


BATCH = KvBatch("é1", 7, 3, 9, b"ops")
HEAD = b"\x01\x92\x02\xc6"
NAME = "é1".encode() + bytes(13)
BODY = b"\x07" + bytes(7) + b"\x03\x03" + NAME + b"\x09" + bytes(7) + b"ops"


def sized(body: bytes) -> bytes:
    return HEAD + len(body).to_bytes(4, "big") + body


def test_a_batch_lies_at_the_places_of_the_page() -> None:
    assert encode(BATCH) == sized(BODY)
    assert decode("events", sized(BODY)) == BATCH


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(HEAD, id="no size"),
        pytest.param(HEAD + bytes(4), id="no head"),
        pytest.param(sized(BODY)[:-1], id="shorter than it says"),
        pytest.param(sized(BODY) + b"x", id="bytes behind it"),
        pytest.param(sized(BODY[:9] + b"\x05" + BODY[10:26]), id="no seq"),
        pytest.param(sized(BODY[:9] + b"\x11" + BODY[10:]), id="a long worker"),
        pytest.param(sized(BODY[:9] + b"\x02" + BODY[10:]), id="bytes behind the worker"),
        pytest.param(sized(BODY[:10] + b"\xff" + BODY[11:]), id="a worker that is not text"),
        pytest.param(b"\x01\x92\x02\xc4" + bytes([len(BODY)]) + BODY, id="another head for the same bytes"),
    ],
)
def test_an_odd_batch_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode("events", data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"worker": "a" * 17},
        {"worker": "\ud800"},
        {"worker": b"a"},
        {"epoch": -1},
        {"seq": 2**64},
        {"rank": 256},
        {"ops": bytes(MAX_OPS + 1)},
        {"ops": "text"},
    ],
)
def test_a_sender_of_an_odd_batch_learns_of_it(wrong: dict[str, object]) -> None:
    with pytest.raises(WireError):
        encode(BATCH._replace(**wrong))  # type: ignore[arg-type]
