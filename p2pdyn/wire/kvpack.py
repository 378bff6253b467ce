"""The packed parts of the KV event protocol: ops, replays, snapshots (docs/design/kv-events.md).

Block hashes are not msgpack: an op is a byte ``kind << 4 | tier``, a u32 count and that many u64, little-endian, so
that a batch of 500 blocks is copied and not parsed.  A batch's ops begin with what most of them are and no more: how
many blocks were removed from the device tier and how many then stored there, two u32, and the hashes of both.  Whatever
a peer sends, :class:`WireError` or valid ops come out, and no more is allocated than a small multiple of the input.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, reduce
from operator import xor
from typing import NamedTuple

from p2pdyn.wire.shape import WireError

STORED, REMOVED, CLEARED = range(3)
DEVICE, HOST, DISK = range(3)
TIERS = 3
MAX_RUNS = 4096
"""Ops of one batch or snapshot: an op is a run of blocks with one fate, so that few are needed."""

HASH_BYTES = 8
OP_BYTES = 5
_OP = struct.Struct("<BI")
_SWAP = struct.Struct("<II")
SWAP_BYTES = _SWAP.size
_LENGTH = struct.Struct("<I")
_REPLAY = struct.Struct("<QQ")
_SNAPSHOT = struct.Struct("<QQI")
_BIG = sys.byteorder == "big"
_CLEARED = CLEARED << 4
_HEADS = frozenset([_CLEARED, *(kind << 4 | tier for kind in (STORED, REMOVED) for tier in range(TIERS))])
_FOLD_FROM = 24


class Op(NamedTuple):
    """``hashes`` (sequence hashes, ``array('Q')``) were stored in or removed from ``tier``; or all tiers cleared."""

    kind: int
    tier: int
    hashes: array[int]


Run = tuple[int, int, bytes]
"""An op as it was received: kind, tier, and its hashes as they are packed, of which :func:`hashes_of` makes numbers."""


class Replay(NamedTuple):
    """Consecutive batches' packed ops, the first of which is batch ``first``."""

    epoch: int
    first: int
    batches: list[bytes]


class Snapshot(NamedTuple):
    """The whole live set as of batch ``seq``: stored ops only."""

    epoch: int
    seq: int
    runs: list[Run]


def pack_ops(ops: Sequence[Op]) -> bytes:
    """The ops of a batch."""
    none = array("Q")
    gone = ops[0].hashes if ops and ops[0][:2] == (REMOVED, DEVICE) else none
    rest = ops[1:] if gone else ops
    come = rest[0].hashes if rest and rest[0][:2] == (STORED, DEVICE) else none
    head = _SWAP.pack(len(gone), len(come)) + little(gone).tobytes() + little(come).tobytes()
    return head + pack_runs(rest[1:] if come else rest)


def pack_runs(ops: Iterable[Op]) -> bytes:
    parts = []
    for kind, tier, hashes in ops:
        parts.append(_OP.pack(kind << 4 | tier, len(hashes)))
        parts.append(little(hashes).tobytes())
    return b"".join(parts)


def unpack_ops(data: bytes) -> list[Run]:
    """Raises WireError."""
    if len(data) < SWAP_BYTES:
        raise WireError("KV ops: truncated")
    gone, come = _SWAP.unpack_from(data)
    middle = SWAP_BYTES + gone * HASH_BYTES
    end = middle + come * HASH_BYTES
    if end > len(data):
        raise WireError("KV ops: a count that does not fit")
    first = [(REMOVED, DEVICE, data[SWAP_BYTES:middle]), (STORED, DEVICE, data[middle:end])]
    return [run for run in first if run[2]] + unpack_runs(data[end:])


def unpack_runs(data: bytes) -> list[Run]:
    """Raises WireError."""
    runs: list[Run] = []
    at, end = 0, len(data)
    while at < end:
        if end - at < OP_BYTES:
            raise WireError("KV ops: truncated")
        head, count = _OP.unpack_from(data, at)
        start = at + OP_BYTES
        at = start + count * HASH_BYTES
        if head not in _HEADS:
            raise WireError("KV ops: unknown kind or tier")
        if (count == 0) is not (head == _CLEARED) or at > end:
            raise WireError("KV ops: a count that does not fit")
        if len(runs) == MAX_RUNS:
            raise WireError(f"KV ops: more than {MAX_RUNS}")
        runs.append((head >> 4, head & 15, data[start:at]))
    return runs


def hashes_of(packed: bytes) -> tuple[int, ...]:
    """The sequence hashes of a :data:`Run`."""
    return _reader(len(packed))(packed)


@lru_cache(maxsize=256)
def _reader(size: int) -> Callable[[bytes], tuple[int, ...]]:
    return struct.Struct(f"<{size // HASH_BYTES}Q").unpack


def pack_replay(epoch: int, first: int, batches: Iterable[bytes]) -> bytes:
    """``batches`` are packed ops, consecutive from batch ``first``."""
    parts = [_REPLAY.pack(epoch, first)]
    for ops in batches:
        parts += _LENGTH.pack(len(ops)), ops
    return b"".join(parts)


def unpack_replay(data: bytes) -> Replay:
    """Raises WireError. The ops are not looked into."""
    at, end = _REPLAY.size, len(data)
    if end < at:
        raise WireError("KV replay: truncated")
    epoch, first = _REPLAY.unpack_from(data)
    batches = []
    while at < end:
        if end - at < _LENGTH.size:
            raise WireError("KV replay: truncated")
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(data, at)[0]
        if at - start < SWAP_BYTES or at > end:
            raise WireError("KV replay: a length that does not fit")
        batches.append(data[start:at])
    return Replay(epoch, first, batches)


def pack_snapshot(epoch: int, seq: int, ops: list[Op]) -> bytes:
    return _SNAPSHOT.pack(epoch, seq, len(ops)) + pack_runs(ops)


def unpack_snapshot(data: bytes) -> Snapshot:
    """Raises WireError."""
    if len(data) < _SNAPSHOT.size:
        raise WireError("KV snapshot: truncated")
    epoch, seq, count = _SNAPSHOT.unpack_from(data)
    runs = unpack_runs(data[_SNAPSHOT.size :])
    if len(runs) != count or any(kind != STORED for kind, _, _ in runs):
        raise WireError("KV snapshot: not as many stored ops as it says")
    return Snapshot(epoch, seq, runs)


def combine(xors: list[int]) -> int:
    """``KvDigest.xor`` of the XOR over each tier's hashes: the tiers' are rotated by 0, 21 and 42 bits.

    Rotation and not a constant: XORing a constant in cancels whenever an even number of blocks is in a wrong tier.
    """
    device, host, disk = xors
    return device ^ _rotate(host, 21) ^ _rotate(disk, 42)


def xor_packed(packed: bytes | bytearray) -> int:
    """The XOR over the hashes of a :data:`Run`, or of several behind one another."""
    return fold(int.from_bytes(packed, "little"))


def fold(number: int) -> int:
    """The XOR over a number's lanes of 64 bits."""
    count = (number.bit_length() + 63) // 64
    while count > 1:  # folded in half: less than half the time of one XOR after the other
        count = (count + 1) // 2
        bits = 64 * count
        number = number >> bits ^ number & (1 << bits) - 1
    return number


def xor_all(hashes: array[int]) -> int:
    """The XOR over ``hashes``."""
    if len(hashes) < _FOLD_FROM:
        return reduce(xor, hashes, 0)
    return fold(int.from_bytes(hashes, sys.byteorder))


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & (2**64 - 1)


def little(numbers: array[int]) -> array[int]:
    """Native order to little-endian or back: itself, except on a big-endian host."""
    if _BIG:
        numbers = numbers[:]
        numbers.byteswap()
    return numbers
