"""The event link: a worker's XPUB; frontends that route its model subscribe.

PUB/SUB has no acknowledgement, so every message carries (epoch, seq) and nothing here serves as failure detector.
Topics are one byte, so that a subscriber may take load alone: ``L`` load, ``K`` KV events, ``D`` digests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from p2pdyn.wire.schema import EVENTS, U8, U32, U64, Bound, Cap, IdStr, message

TOPIC_LOAD = b"L"
TOPIC_KV = b"K"
TOPIC_DIGEST = b"D"


@message(EVENTS, 1)
@dataclass(frozen=True, slots=True)
class LoadEvent:
    """A worker's load, each :data:`p2pdyn.constants.LOAD_EVENT_S` and at once when it changes from idle or to idle."""

    worker: IdStr
    epoch: U64
    seq: U64
    active_requests: U32
    active_blocks: U32
    queued: U32
    kv_used: U32
    kv_total: U32
    prefill_tokens_queued: U64
    prefill_tps: Annotated[float, Bound(0, 1e12)]
    itl_ms: Annotated[float, Bound(0, 1e9)]
    itl_per_block_ms: Annotated[float, Bound(0, 1e9)] = 0.0
    rank: U8 = 0
    """The data-parallel rank that this is about."""
    block_bytes: U64 = 0
    pull_bps: Annotated[float, Bound(0, 1e15)] = 0.0
    work_s: Annotated[float, Bound(0, 1e12)] = 0.0
    slots: U32 = 0


MAX_OPS = 4 * 2**20 - 1024
"""Bytes of one batch's ops; a step that changes more is told in several batches."""


@message(EVENTS, 2)
class KvBatch(NamedTuple):
    """What one engine step changed in the KV cache of data-parallel rank ``rank``; ``seq`` counts from 1 without a
    hole. ``ops`` as :mod:`p2pdyn.wire.kvpack` packs them. docs/design/kv-events.md

    Not a dataclass, and with a layout of its own, because a frontend makes one of each engine step of each worker.
    """

    worker: IdStr
    epoch: U64
    rank: U8
    seq: U64
    ops: Annotated[bytes, Cap(MAX_OPS)]


@message(EVENTS, 3)
@dataclass(frozen=True, slots=True)
class KvDigest:
    """The state of a rank's cache as of batch ``seq``: how many (hash, tier) pairs, and the XOR over them
    (:func:`p2pdyn.wire.kvpack.combine`). ``number`` counts digests, so that one that comes twice proves nothing."""

    worker: IdStr
    epoch: U64
    rank: U8
    seq: U64
    number: U64
    blocks: U32
    xor: U64
