"""How many bytes a control message is on the wire, without encoding it. A test holds these against the codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pdyn.wire.control import Ack, Conflict, Gossip, Nack, Ping, PingReq, Record, Sync, SyncPush, SyncReply

HEADER = 60
"""The header frame: version, kind, cluster name (8 bytes), sender id, epoch, wall clock."""

FRAMING = 2 * (33 + 2)
"""Two ZMTP frames under CURVE: each a MESSAGE command of 33 bytes (name, nonce, MAC, flags) and its own head."""

SEGMENT = 52
"""IPv4 and TCP headers with timestamps. A pure acknowledgement is the same size."""

PAYLOAD = 1448
"""Bytes of data in a full segment: each begun one is another head."""

MESSAGE = HEADER + FRAMING + SEGMENT

OPENING = 900
"""What a client sends to open a connection and close it later: SYN, ACKs, greeting, CURVE HELLO and INITIATE, FIN."""

ACCEPTING = 700
"""What a server sends for it: SYN-ACK, ACKs, greeting, CURVE WELCOME and READY, FIN."""

KEEPALIVE = SEGMENT + 45
"""A ZMTP PING or PONG under CURVE."""


def _integer(value: int) -> int:
    if value < 128:
        return 1
    if value < 2**8:
        return 2
    if value < 2**16:
        return 3
    return 5 if value < 2**32 else 9


def _blob(length: int) -> int:
    return length + (2 if length < 256 else 3)


def record_bytes(record: Record) -> int:
    fixed = 4 + len(record.id) + len(record.origin) + _integer(record.epoch) + _integer(record.incarnation)
    where = len(record.host) + (2 if len(record.host) > 31 else 1) + _integer(record.port)
    return fixed + where + _blob(len(record.info)) + _integer(record.age)


def _updates(records: tuple[Record, ...]) -> int:
    return (1 if len(records) < 16 else 3) + sum(map(record_bytes, records)) if records else 1


def _ping(message: Ping) -> int:
    return 20 + _integer(message.seq) + _updates(message.updates)


def _ack(message: Ack) -> int:
    return 20 + _integer(message.seq) + _integer(message.epoch) + _updates(message.updates)


def _ping_request(message: PingReq) -> int:
    return 21 + _integer(message.seq) + len(message.host) + _integer(message.port) + _updates(message.updates)


def _sync(message: Sync) -> int:
    return 3 + _integer(message.seq) + record_bytes(message.record) + _blob(len(message.digests))


def _sync_reply(message: SyncReply) -> int:
    return 4 + _integer(message.seq) + _integer(message.covered) + _updates(message.records)


_SIZES: dict[type, Callable[[Any], int]] = {
    Ping: _ping,
    Ack: _ack,
    PingReq: _ping_request,
    Nack: lambda message: 3 + _integer(message.seq),
    Gossip: lambda message: 3 + _updates(message.updates),
    Sync: _sync,
    SyncReply: _sync_reply,
    SyncPush: lambda message: 3 + _updates(message.records),
    Conflict: lambda message: 37 + len(message.keeper_host) + len(message.newcomer_host),
}


def message_bytes(message: object) -> int:
    """Bytes of the encoded message frame: version byte, array head, kind and fields."""
    return _SIZES[type(message)](message)
