"""Engines' own KV events. ``kv_wire_frames.json`` was recorded from the msgspec classes of the named releases' own
``kv_events.py`` with msgspec 0.22; blocks there have four tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from p2pdyn.engines.kv_wire import DROPPED, Batch, Decoder, split

RECORDED = json.loads(Path(__file__).with_name("kv_wire_frames.json").read_text())
TOKENS = [5, 6, 7, 8]
STORED = {
    "type": "BlockStored",
    "block_hashes": [1],
    "parent_block_hash": None,
    "token_ids": TOKENS,
    "block_size": 4,
    "lora_id": None,
    "medium": "GPU",
}


def event_of(row: list[Any]) -> KvEvent:
    if row[0] == "stored":
        _, hashes, parent, tokens, salt, lora, tier = row
        return BlocksStored(tuple(hashes), parent, tuple(tokens), salt, lora, tier)
    return BlocksRemoved(tuple(row[1]), row[2]) if row[0] == "removed" else BlocksCleared()


def payload(*events: Any, rank: int | None = 0) -> bytes:
    packed: bytes = msgpack.packb([1.5, events, rank])
    return packed


def decode(*events: Any, decoder: Decoder | None = None) -> Batch:
    return (decoder or Decoder(4)).decode(payload(*events))


@pytest.mark.parametrize("row", RECORDED, ids=[f"{row['source']}: {row['what']}" for row in RECORDED])
def test_what_engines_send_is_understood(row: dict[str, Any]) -> None:
    frames = [bytes.fromhex(one) for one in row["frames"]]
    message = split(frames)
    assert message is not None
    assert message[0] == 7
    decoder = Decoder(4)
    batch = decoder.decode(message[1])
    assert batch.rank == row["rank"]
    assert batch.events == [event_of(one) for one in row["events"]]
    assert dict(decoder.dropped) == row.get("dropped", {})
    assert batch.complete is (True if BlocksCleared() in batch.events else None)


def test_a_batch_may_be_a_map() -> None:
    packed = msgpack.packb({"ts": 1.5, "events": [STORED], "data_parallel_rank": 2})
    assert Decoder(4).decode(packed) == Batch(2, [BlocksStored((1,), None, tuple(TOKENS))])


def test_a_replay_is_read_with_topic_and_without() -> None:
    seq, end = (9).to_bytes(8, "big"), (-1).to_bytes(8, "big", signed=True)
    assert split([b"kv", seq, b"x"]) == split([b"", b"kv", seq, b"x"]) == split([b"", seq, b"x"]) == (9, b"x")
    assert split([b"", b"", end, b""]) == split([b"", end, b""]) == (-1, b"")


@pytest.mark.parametrize(
    "frames", [[], [b"x"], [b"kv", b"short", b"x"], [b"", (-2).to_bytes(8, "big", signed=True), b""]]
)
def test_other_frames_are_none(frames: list[bytes]) -> None:
    assert split(frames) is None
    assert split([b"1", b"2", b"3", bytes(8), b"5"]) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": None}, "tokens"),
        ({"token_ids": TOKENS[:3]}, "tokens"),
        ({"token_ids": [5, 6, 7, -1]}, "tokens"),
        ({"token_ids": [5, 6, 7, 2**32]}, "tokens"),
        ({"token_ids": [5, 6, 7, True]}, "tokens"),
        ({"token_ids": [5, 6, 7, [1, 2, 3]]}, "tokens"),
        ({"block_hashes": []}, "malformed"),
        ({"block_hashes": "one"}, "malformed"),
        ({"block_hashes": [1.5]}, "malformed"),
        ({"block_hashes": [b""]}, "malformed"),
        ({"block_hashes": [bytes(65)]}, "malformed"),
        ({"parent_block_hash": "one"}, "malformed"),
        ({"lora_name": 3}, "malformed"),
        ({"lora_id": 3}, "lora"),
        ({"extra_keys": [None, None]}, "malformed"),
        ({"extra_keys": ["salt"]}, "malformed"),
        ({"extra_keys": [["salt", "another"]]}, "keys"),
        ({"medium": "TAPE"}, "tier"),
        ({"medium": 3}, "tier"),
        ({"medium": "EXTERNAL"}, "tier"),
        ({"locality": "REMOTE"}, "tier"),
        ({"group_idx": 0, "kv_cache_spec_kind": "mamba"}, "group"),
        ({"group_idx": 0, "kv_cache_spec_kind": ["full_attention"]}, "group"),
        ({"group_idx": [1], "kv_cache_spec_kind": "full_attention"}, "group"),
        ({"type": "BlockMoved"}, "type"),
        ({"type": ["BlockStored"]}, "type"),
    ],
)
def test_what_cannot_be_used_is_dropped_and_counted_and_the_rest_stays(change: dict[str, Any], reason: str) -> None:
    decoder = Decoder(4)
    batch = decode(STORED | change, STORED, decoder=decoder)
    assert batch == Batch(0, [BlocksStored((1,), None, tuple(TOKENS))])
    assert dict(decoder.dropped) == {reason: 1}
    assert reason in DROPPED


def test_unknown_fields_are_ignored_and_optional_ones_may_be_missing() -> None:
    wanted = [BlocksStored((1,), None, tuple(TOKENS))]
    assert decode(STORED | {"colour": "red"}).events == wanted
    assert decode({key: STORED[key] for key in ("type", "block_hashes", "token_ids", "block_size")}).events == wanted
    assert decode(["BlockStored", [1], None, TOKENS, 4]).events == wanted
    row = ["BlockStored", [1], None, TOKENS, 4, None, "GPU", None, None, None, None, None, None, "later"]
    assert decode(row).events == wanted
    assert decode({"type": "BlockRemoved", "block_hashes": [1]}).events == [BlocksRemoved((1,))]
    assert decode(["BlockRemoved", [1]], ["AllBlocksCleared"]).events == [BlocksRemoved((1,)), BlocksCleared()]


def test_an_older_engine_names_no_kind_of_group_then_the_first_one_counts() -> None:
    batch = decode(STORED | {"group_idx": 1}, STORED | {"group_idx": 0}, ["BlockRemoved", [1], "GPU", 1])
    assert batch.events == [BlocksStored((1,), None, tuple(TOKENS))]


def test_each_tier_has_a_main_group_of_its_own() -> None:
    full = {"kv_cache_spec_kind": "mla_attention"}
    batch = decode(
        STORED | full | {"group_idx": 0}, STORED | full | {"group_idx": 3, "medium": "CPU"},
        ["BlockRemoved", [1], "GPU", 3], ["BlockRemoved", [1], "CPU", 3],
    )  # fmt: skip
    tokens = tuple(TOKENS)
    assert batch.events == [
        BlocksStored((1,), None, tokens),
        BlocksStored((1,), None, tokens, tier=1),
        BlocksRemoved((1,), 1),
    ]


def test_another_block_size_is_one_sentence_until_the_right_one_comes() -> None:
    decoder = Decoder(16)
    assert decode(STORED, decoder=decoder).events == []
    assert "blocks of 4 tokens, its configuration says 16" in decoder.error
    decode(STORED | {"token_ids": list(range(16)), "block_size": 16}, decoder=decoder)
    assert decoder.error == ""
    decode(STORED, decoder=decoder)
    assert decoder.error == ""
    assert decoder.dropped["block-size"] == 2


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x93\x01", b"\xdd\xff\xff\xff\xff", msgpack.packb([1.5]), msgpack.packb([1.5, None, 0]),
     msgpack.packb([1.5, [], "0"]), msgpack.packb(3), b"\x91" * 5000, payload(STORED) + b"\0"],
)  # fmt: skip
def test_an_unreadable_message_may_have_removed_anything(data: bytes) -> None:
    decoder = Decoder(4)
    assert decoder.decode(data) == Batch(None, [BlocksCleared()], False)
    assert dict(decoder.dropped) == {"unreadable": 1}


def test_an_unreadable_removal_clears_and_what_follows_counts() -> None:
    batch = decode(STORED, {"type": "BlockRemoved", "block_hashes": None}, STORED)
    stored = BlocksStored((1,), None, tuple(TOKENS))
    assert batch == Batch(0, [stored, BlocksCleared(), stored], False)
    assert decode(["BlockRemoved", 3], ["AllBlocksCleared"]).complete is True


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    check(Decoder(4).decode(data))


plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=9)
)
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
maps = st.fixed_dictionaries(
    {"type": st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"])},
    optional={
        "block_hashes": anything | st.lists(st.integers(-(2**63), 2**64 - 1), max_size=3),
        "parent_block_hash": anything,
        "token_ids": anything | st.just(TOKENS) | st.just(TOKENS * 2),
        "block_size": anything | st.just(4),
        "lora_id": anything,
        "medium": anything | st.sampled_from(["GPU", "CPU", "DISK"]),
        "lora_name": anything,
        "cache_salt": anything,
        "extra_keys": anything | st.lists(anything, min_size=1, max_size=2),
        "group_idx": anything | st.just(0),
        "kv_cache_spec_kind": anything,
        "locality": anything,
    },
)
arrays = st.lists(anything, max_size=10).flatmap(
    lambda row: st.sampled_from([["BlockStored", *row], ["BlockRemoved", *row], ["AllBlocksCleared", *row]])
)


@given(st.lists(maps | arrays | anything, max_size=4))
def test_no_event_breaks_the_decoder(events: list[Any]) -> None:
    check(decode(*events))


def check(batch: Batch) -> None:
    for event in batch.events:
        if isinstance(event, BlocksCleared):
            continue
        assert event.hashes
        assert all(type(one) is int and 0 <= one < 2**64 for one in event.hashes)
        assert event.tier in (0, 1, 2)
        if isinstance(event, BlocksStored):
            assert len(event.tokens) == 4 * len(event.hashes)
            assert all(type(one) is int and 0 <= one < 2**32 for one in event.tokens)
            assert isinstance(event.salt, str)
            assert isinstance(event.lora, str)
            assert event.parent is None or 0 <= event.parent < 2**64
