"""Messages to bytes and back: one version byte, then a msgpack array ``[kind, field, field, ...]``.

Nothing that a peer sends may raise anything but :class:`WireError`, allocate more than a small multiple of its own
size, or come out with a type, length or range that the schema does not name.  ``Tokens``, up to 200,000 deltas a second
through one frontend, and ``KvBatch``, one of each engine step of each worker, have layouts of their own.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any, cast

import msgpack

from p2pdyn.constants import CONTROL_MAX, EVENT_MAX, PROTOCOL_VERSION, REQUEST_MAX, TRANSFER_MAX
from p2pdyn.wire.blobs import (
    decode_info,
    decode_logprobs,
    decode_params,
    encode_info,
    encode_logprobs,
    encode_params,
)
from p2pdyn.wire.events import KvBatch
from p2pdyn.wire.kvbatch import BATCH_HEAD, dump_batch, load_batch, refuse_batch
from p2pdyn.wire.pack import unpack
from p2pdyn.wire.requests import FINISHES, MAX_OPEN, Delta, Row, Tokens
from p2pdyn.wire.schema import CONTROL, EVENTS, REGISTRY, REQUESTS, TRANSFER
from p2pdyn.wire.shape import WireError, field_shapes, record_shape

__all__ = [
    "LIMITS",
    "FutureVersion",
    "WireError",
    "decode",
    "decode_info",
    "decode_logprobs",
    "decode_params",
    "encode",
    "encode_info",
    "encode_logprobs",
    "encode_params",
    "encode_tokens",
]

LIMITS = {CONTROL: CONTROL_MAX, REQUESTS: REQUEST_MAX, EVENTS: EVENT_MAX, TRANSFER: TRANSFER_MAX}
"""Largest encoded message of each link, in bytes; also the link's MAXMSGSIZE."""

LAST_VERSION = 31
"""No protocol version will be higher, so that text is not taken for a message from the future."""

_VERSION = bytes([PROTOCOL_VERSION])


class FutureVersion(WireError):
    """A message from a newer protocol. It is dropped and counted like any other, but people should hear of it."""

    def __init__(self, version: int) -> None:
        super().__init__(f"protocol version {version}, this peer speaks {PROTOCOL_VERSION}: upgrade the older one")
        self.version = version


_dumps: dict[type, tuple[str, int, Any]] = {}
_loads: dict[str, dict[int, Any]] = {link: {} for link in REGISTRY}


def encode(message: object) -> bytes:
    """The bytes of a registered message. Raises WireError if it breaks its own schema: a mistake on this side."""
    if type(message) is Tokens:
        return encode_tokens(message.epoch, message.deltas)
    if type(message) is KvBatch:
        return dump_batch(message)
    link, kind, dump = _dumps.get(type(message)) or _learn(type(message))
    return _sized(_VERSION + msgpack.packb([kind, *dump(message)]), link)


def _sized(data: bytes, link: str) -> bytes:
    if len(data) > LIMITS[link]:
        raise WireError(f"larger than the {LIMITS[link]} bytes of the {link} link")
    return data


def decode(link: str, data: bytes) -> object:
    """The message that ``data`` holds. Raises WireError, FutureVersion among them, and nothing else."""
    if link == EVENTS and data.startswith(BATCH_HEAD):
        return load_batch(data)
    if not data:
        raise WireError("empty message")
    if data[0] != PROTOCOL_VERSION:
        if PROTOCOL_VERSION < data[0] <= LAST_VERSION:
            raise FutureVersion(data[0])
        raise WireError("not a message of ours")
    if len(data) > LIMITS[link]:
        raise WireError(f"larger than the {LIMITS[link]} bytes of the {link} link")
    fields = unpack(memoryview(data)[1:], maps=False)
    if type(fields) is not tuple or not fields or type(fields[0]) is not int:
        raise WireError("not an array that starts with its kind")
    load = _loads[link].get(fields[0])
    if load is None:
        cls = REGISTRY[link].get(fields[0])
        if cls is None:
            raise WireError(f"unknown kind on the {link} link")
        _learn(cls)
        load = _loads[link][fields[0]]
    return load(fields[1:])


def _learn(cls: type) -> tuple[str, int, Any]:
    """Compile a message class on its first use, so that the codec need not import every link's messages."""
    for link, kinds in REGISTRY.items():
        for kind, known in kinds.items():
            if known is cls:
                shape = record_shape(cls)
                _dumps[cls] = (link, kind, shape.dump)
                _loads[link][kind] = shape.load
                return _dumps[cls]
    raise TypeError(f"{cls.__name__} is not a message: decorate it with @message")


# Tokens: fixed records, whose types and ranges hold by construction, then the ids of all deltas in one column, and
# logprobs, which few ask for, in another: nothing, or one item a delta. The order of the deltas is kept.
_TOKENS_KIND: int = Tokens.KIND  # type: ignore[attr-defined]
_EPOCH = struct.Struct("<Q")
_RECORD = struct.Struct("<QIIHBB")  # rid, offset, cached, number of ids, attempt, finish
_FINISH = {finish: code for code, finish in enumerate(FINISHES)}
_check_logprobs = field_shapes(Delta)[-1].load
_SWAP = sys.byteorder != "little"


def encode_tokens(epoch: int, deltas: Sequence[Row]) -> bytes:
    """What ``encode(Tokens(epoch, deltas))`` gives; plain tuples spare the worker building a Delta for each."""
    if len(deltas) > MAX_OPEN:
        raise WireError(f"Tokens.deltas: more than {MAX_OPEN} items")
    ids: list[int] = []
    pack, chances = _RECORD.pack, False
    try:
        records = [_EPOCH.pack(epoch)]
        add = records.append
        for rid, attempt, offset, tokens, finish, cached, logprobs in deltas:
            add(pack(rid, offset, cached, len(tokens), attempt, _FINISH[finish]))
            ids += tokens
            if logprobs:
                chances = True
        column = array("I", ids)
    except (struct.error, TypeError, KeyError, OverflowError) as error:
        raise WireError(f"Tokens: {error}") from None
    if _SWAP:
        column.byteswap()
    rest = [_check_logprobs(delta[6]) for delta in deltas] if chances else ()
    return _sized(_VERSION + msgpack.packb((_TOKENS_KIND, b"".join(records), column.tobytes(), rest)), REQUESTS)


def _load_tokens(fields: tuple[Any, ...]) -> Tokens:
    if len(fields) != 3 or [*map(type, fields)] != [bytes, bytes, tuple]:
        raise WireError("Tokens: not records, ids and logprobs")
    block, column, rest = fields
    count, odd = divmod(len(block) - _EPOCH.size, _RECORD.size)
    if count < 0 or odd or len(column) % 4 or len(rest) not in (0, count):
        raise WireError("Tokens: not a whole number of records, ids or logprobs")
    if count > MAX_OPEN:
        raise WireError(f"Tokens.deltas: more than {MAX_OPEN} items")
    numbers = array("I", column)
    if _SWAP:
        numbers.byteswap()
    ids = tuple(numbers)
    deltas: list[Row] = []
    add, start = deltas.append, 0
    try:
        for rid, offset, cached, size, attempt, finish in _RECORD.iter_unpack(memoryview(block)[_EPOCH.size :]):
            end = start + size
            add((rid, attempt, offset, ids[start:end], FINISHES[finish], cached, b""))
            start = end
    except IndexError:
        raise WireError("Delta.finish: unknown") from None
    if start != len(ids):
        raise WireError("Tokens: records and their ids do not match")
    if rest:
        deltas = [(*delta[:6], _check_logprobs(logprobs)) for delta, logprobs in zip(deltas, rest, strict=True)]
    return Tokens(_EPOCH.unpack_from(block)[0], cast(tuple[Delta, ...], tuple(deltas)))


_loads[REQUESTS][_TOKENS_KIND] = _load_tokens


_loads[EVENTS][KvBatch.KIND] = refuse_batch  # type: ignore[attr-defined]
