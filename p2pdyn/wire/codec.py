"""Messages to bytes and back: one version byte, then a msgpack array ``[kind, field, field, ...]``.

Nothing that a peer sends may raise anything but :class:`WireError`, allocate more than a small multiple of its own
size, or come out with a type, length or range that the schema does not name.  ``Tokens``, up to 200,000 deltas a second
through one frontend, has a layout of its own: see :func:`encode_tokens`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, cast

import msgpack

from p2pdyn.constants import CONTROL_MAX, EVENT_MAX, PROTOCOL_VERSION, REQUEST_MAX
from p2pdyn.wire.blobs import (
    decode_info,
    decode_logprobs,
    decode_params,
    encode_info,
    encode_logprobs,
    encode_params,
)
from p2pdyn.wire.pack import unpack
from p2pdyn.wire.requests import MAX_OPEN, Delta, Row, Tokens
from p2pdyn.wire.schema import CONTROL, EVENTS, REGISTRY, REQUESTS
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

LIMITS = {CONTROL: CONTROL_MAX, REQUESTS: REQUEST_MAX, EVENTS: EVENT_MAX}
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
_loads: dict[str, dict[int, Any]] = {CONTROL: {}, REQUESTS: {}, EVENTS: {}}


def encode(message: object) -> bytes:
    """The bytes of a registered message. Raises WireError if it breaks its own schema: a mistake on this side."""
    if type(message) is Tokens:
        return encode_tokens(message.epoch, message.deltas)
    link, kind, dump = _dumps.get(type(message)) or _learn(type(message))
    return _sized(_VERSION + msgpack.packb([kind, *dump(message)]), link)


def _sized(data: bytes, link: str) -> bytes:
    if len(data) > LIMITS[link]:
        raise WireError(f"larger than the {LIMITS[link]} bytes of the {link} link")
    return data


def decode(link: str, data: bytes) -> object:
    """The message that ``data`` holds. Raises WireError, FutureVersion among them, and nothing else."""
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


# Tokens. Almost every delta is one token and nothing else, so deltas travel as fixed records, whose types and ranges
# hold by construction: rid u64, offset u32, token u32, attempt u8, and a flag. A set flag means that the rest of the
# delta is the next of a second array, [[token, ...], finish, cached, logprobs]. The order of the deltas is kept.
_TOKENS_KIND: int = Tokens.KIND  # type: ignore[attr-defined]
_EPOCH = struct.Struct("<Q")
_DELTA = struct.Struct("<QIIBB")
_check_tokens, _check_finish, _check_cached, _check_logprobs = (s.load for s in field_shapes(Delta)[3:])


def encode_tokens(epoch: int, deltas: Sequence[Row]) -> bytes:
    """What ``encode(Tokens(epoch, deltas))`` gives; plain tuples spare the worker building a Delta for each."""
    if len(deltas) > MAX_OPEN:
        raise WireError(f"Tokens.deltas: more than {MAX_OPEN} items")
    rest: list[tuple[Any, ...]] = []
    pack = _DELTA.pack
    try:
        records = [_EPOCH.pack(epoch)]
        add = records.append
        for rid, attempt, offset, tokens, finish, cached, logprobs in deltas:
            if len(tokens) == 1 and not finish and not cached and not logprobs:
                add(pack(rid, offset, tokens[0], attempt, 0))
            else:
                add(pack(rid, offset, 0, attempt, 1))
                rest.append(_rest(tokens, finish, cached, logprobs))
    except (struct.error, TypeError) as error:
        raise WireError(f"Tokens: {error}") from None
    return _sized(_VERSION + msgpack.packb((_TOKENS_KIND, b"".join(records), rest)), REQUESTS)


def _rest(tokens: Any, finish: Any, cached: Any, logprobs: Any) -> tuple[Any, Any, Any, Any]:
    return _check_tokens(tokens), _check_finish(finish), _check_cached(cached), _check_logprobs(logprobs)


def _load_tokens(fields: tuple[Any, ...]) -> Tokens:
    if len(fields) != 2 or type(fields[0]) is not bytes or type(fields[1]) is not tuple:
        raise WireError("Tokens: not records and their rest")
    block, rest = fields
    count, odd = divmod(len(block) - _EPOCH.size, _DELTA.size)
    if count < 0 or odd:
        raise WireError("Tokens: not a whole number of records")
    if count > MAX_OPEN:
        raise WireError(f"Tokens.deltas: more than {MAX_OPEN} items")
    deltas: list[Row] = []
    add, more = deltas.append, iter(rest)
    for rid, offset, token, attempt, flag in _DELTA.iter_unpack(memoryview(block)[_EPOCH.size :]):
        if not flag:
            add((rid, attempt, offset, (token,), "", 0, b""))
            continue
        extra = next(more, None)
        if flag != 1 or token or type(extra) is not tuple or len(extra) != 4:
            raise WireError("Tokens: records and their rest do not match")
        add((rid, attempt, offset, *_rest(*extra)))
    if next(more, None) is not None or len(rest) > len(deltas):
        raise WireError("Tokens: records and their rest do not match")
    return Tokens(_EPOCH.unpack_from(block)[0], cast(tuple[Delta, ...], tuple(deltas)))


_loads[REQUESTS][_TOKENS_KIND] = _load_tokens
