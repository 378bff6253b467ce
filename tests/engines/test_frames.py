"""Steps between a peer and its engine's child arrive as they were sent."""

from __future__ import annotations

from p2pdyn.core.types import Load
from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored, Step
from p2pdyn.engines.frames import FrameBuffer, frame, pack_step, unpack_step


def test_kv_events_keep_ids_of_64_bits_salt_lora_and_tier() -> None:
    kv = [
        BlocksStored((2**64 - 1, 1), None, tuple(range(32)), "tenant", "adapter", 1),
        BlocksStored((7,), 1, (0, 2**32 - 1)),
        BlocksRemoved((7, 8), 2),
        BlocksRemoved(()),
        BlocksCleared(),
    ]
    (content,) = FrameBuffer().feed(frame(pack_step(Step([], kv), Load())))
    assert unpack_step(content, set()).kv == kv
