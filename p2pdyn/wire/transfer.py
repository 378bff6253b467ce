"""What two movers of KV blocks say to each other (docs/design/kv-transfer.md).

A :class:`Description` travels inside the request link's Fetch; the rest is the transfer link of the tcp mover: a
reader's DEALER to the owner's ROUTER.  A :class:`Part` is followed by one more frame, its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from p2pdyn.wire.schema import TRANSFER, U16, U32, U64, Bound, Cap, Name, Sentence, message

PART = 256 * 1024
"""Bytes of one answer: a millisecond of a loop's time at the slowest."""
MAX_SPANS = 512
"""Pieces of memory in one answer."""
MAX_REGIONS = 4
MAX_AGENT = 64 * 1024
"""Bytes of a NIXL agent's metadata; with two regions it is about 500."""

_SPAN = struct.Struct("<BQI")  # region, offset in it in bytes, size in bytes


class Span(NamedTuple):
    """Bytes [start, start + size) of a region."""

    region: int
    start: int
    size: int


def pack_spans(spans: Iterable[Span]) -> bytes:
    return b"".join([_SPAN.pack(*span) for span in spans])


def unpack_spans(data: bytes) -> list[Span] | None:
    """None: not a whole number of spans."""
    return [Span(*span) for span in _SPAN.iter_unpack(data)] if len(data) % _SPAN.size == 0 else None


@message(TRANSFER, 1)
@dataclass(frozen=True, slots=True)
class Description:
    """What a peer needs to read blocks from here with ``mover``: its blocks, their bytes in each region, and where they
    are. ``life`` is drawn at random each time a mover is made. nixl: ``bases`` are the regions' addresses, ``agent`` is
    its agent's metadata; ``machine`` and ``rdma`` tell whether the other can reach memory here directly."""

    mover: Name
    life: U64
    blocks: U32
    strides: Annotated[tuple[U32, ...], Cap(MAX_REGIONS)]
    port: U16 = 0
    machine: U64 = 0
    rdma: bool = False
    bases: Annotated[tuple[U64, ...], Cap(MAX_REGIONS)] = ()
    agent: Annotated[bytes, Cap(MAX_AGENT)] = b""


@message(TRANSFER, 2)
@dataclass(frozen=True, slots=True)
class Offer:
    """The descriptions of all movers of a peer, best first."""

    descriptions: Annotated[tuple[Annotated[bytes, Cap(MAX_AGENT + 1024)], ...], Cap(4)]


@message(TRANSFER, 3)
@dataclass(frozen=True, slots=True)
class Ask:
    """Send these :class:`Span` (packed), PART bytes at most in all. ``number`` is the reader's and comes back; ``life``
    is the owner's, so that an owner that was restarted refuses."""

    number: U64
    life: U64
    spans: Annotated[bytes, Cap(_SPAN.size * MAX_SPANS)]


@message(TRANSFER, 4)
@dataclass(frozen=True, slots=True)
class Probe:
    """Send so many zeros: proves the connection, and measures it."""

    number: U64
    life: U64
    size: Annotated[int, Bound(0, PART)]


@message(TRANSFER, 5)
@dataclass(frozen=True, slots=True)
class Part:
    """Answer to an Ask or a Probe: all its bytes, in order, are the next frame."""

    number: U64


@message(TRANSFER, 6)
@dataclass(frozen=True, slots=True)
class Refusal:
    """Answer to an Ask or a Probe that is not served."""

    number: U64
    reason: Sentence
