"""The bytes of a :class:`~p2pdyn.wire.events.KvBatch` (docs/design/wire.md): every field lies at a fixed place.

A frontend gets one of each engine step of each worker, and almost all of them say that some blocks left the device tier
and others came.  For these :func:`swap_shape` has the whole message in one ``struct``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from p2pdyn.constants import PROTOCOL_VERSION
from p2pdyn.wire.events import MAX_OPS, KvBatch
from p2pdyn.wire.kvpack import HASH_BYTES, SWAP_BYTES
from p2pdyn.wire.shape import WireError

BATCH_HEAD = bytes([PROTOCOL_VERSION, 0x92, KvBatch.KIND, 0xC6])  # type: ignore[attr-defined]
"""An array of the kind and one bytes item, whose size follows."""

_BATCH = struct.Struct("<4s4sQBB16sQ")  # the heads, size of the item, epoch, rank, bytes of the id, the id, seq
_TAG = struct.Struct("<QBB16s")
_ITEM = 8
"""Where the item begins."""
_MAX_ID = 16

RANK_AT = _ITEM + 8
HASHES_AT = _BATCH.size + SWAP_BYTES
"""Where the hashes lie."""

MAX_SWAP = 8192
"""Blocks; larger batches are applied in slices."""

Unpack = Callable[[bytes], tuple[Any, ...]]
"""Makes of a message its first 8 bytes as a number, its :func:`batch_tag`, seq, how many blocks were removed, how many
stored, and the hashes of both."""


def batch_tag(worker: str, epoch: int, rank: int) -> bytes:
    """What all messages of a stream have in common."""
    name = worker.encode()
    return _TAG.pack(epoch, rank, len(name), name)


@lru_cache(maxsize=512)
def swap_shape(size: int) -> tuple[int, Unpack] | None:
    """How to read a message of ``size`` bytes if it only tells of blocks removed from and stored in the device tier;
    None: none such is so long. The message is one if its first number is the one given here and its counts add up to
    its hashes."""
    count, odd = divmod(size - HASHES_AT, HASH_BYTES)
    if not 0 <= count <= MAX_SWAP or odd:
        return None
    lead = int.from_bytes(BATCH_HEAD + (size - _ITEM).to_bytes(4, "big"), "little")
    return lead, struct.Struct(f"<Q{_TAG.size}sQII{count}Q").unpack


def dump_batch(batch: KvBatch) -> bytes:
    """Raises WireError."""
    worker, epoch, rank, seq, ops = batch
    try:
        name = worker.encode()
        if len(name) > _MAX_ID or type(ops) is not bytes or len(ops) > MAX_OPS:
            raise WireError("KvBatch: the worker or ops are too long")
        size = (_BATCH.size - _ITEM + len(ops)).to_bytes(4, "big")
        return _BATCH.pack(BATCH_HEAD, size, epoch, rank, len(name), name, seq) + ops
    except (struct.error, AttributeError, UnicodeEncodeError, TypeError) as error:
        raise WireError(f"KvBatch: {error}") from None


def load_batch(data: bytes) -> KvBatch:
    """``data`` begins with :data:`BATCH_HEAD`. Raises WireError; the ops are not looked into."""
    try:
        _, size, epoch, rank, length, name, seq = _BATCH.unpack_from(data)
        worker = name[:length].decode()
    except (struct.error, UnicodeDecodeError):
        raise WireError("KvBatch: truncated, or its worker is not text") from None
    ops = data[_BATCH.size :]
    if int.from_bytes(size, "big") != len(data) - _ITEM or len(ops) > MAX_OPS:
        raise WireError("KvBatch: a length that does not fit")
    if length > _MAX_ID or any(name[length:]):
        raise WireError("KvBatch: an odd worker")
    return KvBatch(worker, epoch, rank, seq, ops)


def refuse_batch(_: tuple[Any, ...]) -> KvBatch:
    """For the same message with other msgpack heads. Raises WireError."""
    raise WireError("KvBatch: not in its own layout")
