"""The sizes that the simulator accounts for are those of the codec."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.membership import address, record

from p2pdyn.sim.cluster import FIRST_EPOCH, INFO_BYTES
from p2pdyn.sim.sizes import HEADER, message_bytes
from p2pdyn.wire.codec import encode
from p2pdyn.wire.control import Ack, Conflict, Gossip, Nack, Ping, PingReq, Sync, SyncPush, SyncReply
from p2pdyn.wire.header import Header

ALIVE = record(1, epoch=FIRST_EPOCH, info=bytes(INFO_BYTES))
RUMOUR = record(2, "suspect", epoch=FIRST_EPOCH, incarnation=3, origin=ALIVE.id)
OLD = replace(ALIVE, state=2, age=100_000)
SEQ, HOST = 4_000_000_000, address(1).host


@pytest.mark.parametrize(
    "message",
    [
        Ping(SEQ, ALIVE.id, ()),
        Ping(SEQ, ALIVE.id, (RUMOUR,)),
        Ack(SEQ, ALIVE.id, FIRST_EPOCH, (ALIVE, RUMOUR)),
        PingReq(SEQ, ALIVE.id, HOST, 7400, ()),
        Nack(SEQ),
        Gossip((ALIVE,) * 12),
        Sync(SEQ, ALIVE, bytes(512)),
        SyncReply(SEQ, 2**64 - 1, True, (ALIVE, OLD) * 50),
        SyncPush((OLD,)),
        Conflict(ALIVE.id, HOST, 7400, HOST, 7400, FIRST_EPOCH),
    ],
    ids=lambda message: type(message).__name__,
)
def test_accounted_size(message: object) -> None:
    assert message_bytes(message) == pytest.approx(len(encode(message)), abs=4, rel=0.01)


def test_header() -> None:
    assert len(encode(Header("p2pdyn-1", ALIVE.id, FIRST_EPOCH, FIRST_EPOCH))) <= HEADER
