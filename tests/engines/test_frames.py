"""What passes between a peer and its engine's child arrives as it was sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.engines import sequence

from p2pdyn.core.types import Load
from p2pdyn.engines.base import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    EngineOptions,
    Held,
    Pin,
    Release,
    Reserved,
    Settle,
    Step,
    TransferNote,
    TransferOrder,
)
from p2pdyn.engines.frames import (
    FrameBuffer,
    FrameError,
    frame,
    pack_options,
    pack_order,
    pack_sequence,
    pack_step,
    unpack_options,
    unpack_order,
    unpack_sequence,
    unpack_step,
)

KEYS = (bytes(range(16)), bytes(16))


def sent(content: object) -> Any:
    (arrived,) = FrameBuffer().feed(frame(content))
    return arrived


def test_kv_events_keep_ids_of_64_bits_salt_lora_and_tier() -> None:
    kv = [
        BlocksStored((2**64 - 1, 1), None, tuple(range(32)), "tenant", "adapter", 1),
        BlocksStored((7,), 1, (0, 2**32 - 1)),
        BlocksRemoved((7, 8), 2),
        BlocksRemoved(()),
        BlocksCleared(),
    ]
    assert unpack_step(sent(pack_step(Step([], kv), Load())), set()).kv == kv


def test_notes_reach_the_peer_whole_whatever_it_has_aborted() -> None:
    notes: list[TransferNote] = [
        Held(2**62, (5, 3), (1, 2**32 - 1), KEYS, 12),
        Held(2),
        Held(3, cached=7, params=b"\x00opaque"),
        Reserved(4, 2, (8, 1), KEYS),
        Reserved(5, 3, (), ()),
    ]
    assert unpack_step(sent(pack_step(Step([], [], notes), Load())), set()).transfers == notes


@pytest.mark.parametrize("order", [Pin(1, KEYS), Pin(2, ()), Release(2**62), Settle(4, 3), Settle(5, 0, over=False)])
def test_orders_reach_the_engine_whole(order: TransferOrder) -> None:
    assert unpack_order(sent(pack_order(order))) == order


def test_what_a_sequence_wants_moved_reaches_the_engine() -> None:
    job = replace(sequence(7, [1, 2], [3]), rank=2, hand_over=True, pull=4, remote=b"\xffparams")
    assert unpack_sequence(sent(pack_sequence(job))) == job


def test_options_reach_the_child_whole() -> None:
    options = EngineOptions(
        "m", "n", ("--x", "1"), True, node="ab", epoch=2**41, role="decode", side_port=9, kv_memory=5
    )
    assert unpack_options(sent(pack_options("sim", "module", options, 7))) == ("sim", "module", 7, options)


@pytest.mark.parametrize(
    "note",
    [
        [],
        [1],
        [1, 2, [3], []],
        [1, [2], [3], [], 0, b""],
        [1, 2, [3], [KEYS[0]], 0],
        ["1", 2, [], []],
        [1, [], [], [], 0, ""],
    ],
)
def test_a_note_of_a_wrong_shape_is_refused(note: list[Any]) -> None:
    content = sent(pack_step(Step(), Load()))
    content[-2] = [note]

    with pytest.raises(FrameError, match="step has a wrong shape"):
        unpack_step(content, set())


@pytest.mark.parametrize(
    "order", [["pin"], ["pin", 1], ["drop", 1], ["settle", 1, 2], ["settle", 1, "2", True], ["settle", 1, 2, 3], [1]]
)
def test_an_order_of_a_wrong_shape_is_refused(order: list[Any]) -> None:
    with pytest.raises(FrameError, match="order has a wrong shape"):
        unpack_order(order)
