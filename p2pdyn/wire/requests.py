"""The request link: a worker's ROUTER, one DEALER a frontend and worker.

What ZeroMQ does not promise is put into the messages (docs/design/wire.md): a generate names the worker epoch it is
meant for, a token frame the attempt and the offset of its first token.  ``rid`` is the frontend's own number for the
request; the worker keys requests by (connection, rid, attempt).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from operator import attrgetter, ne
from typing import Annotated, NamedTuple

from p2pdyn.core.types import SamplingParams
from p2pdyn.wire.schema import I64, REQUESTS, U8, U32, U64, Cap, IdStr, Name, Sentence, message

MAX_PROMPT_BYTES = 16 * 2**20  # 4 Mi token ids
CHUNK = 256 * 1024
"""Bytes. Bulk transfers (cards, snapshots) go in such chunks, one outstanding, so that tokens pass between them."""
MAX_STEP_TOKENS = 65535
"""Of one request in one message: a u16."""
MAX_OPEN = 65536
MAX_REMOTE = 1 << 20
"""Bytes of an engine's own transfer parameters: block numbers and addresses."""
MAX_BLOCKS = 1 << 18
"""KV blocks of one transfer: 4 Mi tokens in blocks of 16."""
KEY = 16
"""Bytes of a block's key."""


@message(REQUESTS, 1)
@dataclass(frozen=True, slots=True)
class Hello:
    """First on a new connection, and each second while it is open: who asks. A worker that has heard no Hello from a
    connection for :data:`p2pdyn.constants.ORPHAN_S` cancels its requests."""

    frontend: IdStr
    epoch: U64


@message(REQUESTS, 2)
@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to each Hello: the worker's identity and its load, so that a link proves itself before it is used."""

    worker: IdStr
    epoch: U64
    active_requests: U32
    queued: U32
    kv_used: U32
    kv_total: U32


@message(REQUESTS, 3)
@dataclass(frozen=True, slots=True)
class Generate:
    """Run one sequence. ``tokens`` are little-endian u32 ids: the prompt, then what earlier attempts already produced.

    ``prompt_len`` says where the prompt ends (seeds and min_tokens count from there); ``epoch`` is the worker's, and a
    worker of another epoch refuses.  ``whole``: nobody looks at single tokens, so those between the first and the last
    may be sent together, a few times a second.  ``traceparent`` is the client's (W3C Trace Context), or empty.
    ``rank`` is the worker's data-parallel rank that it was routed to.  ``uncached`` is the router's estimate of the
    tokens that the worker will have to compute, 0 if it has none: what the worker reports of its queue adds these up.

    Prefill/decode and prefix pulls (docs/design/kv-transfer.md): ``hand_over`` asks for the prompt only, its blocks
    held and told as :class:`Prefilled`.  ``pull`` says how many leading blocks worker ``source`` of ``source_epoch``
    has for it, under ``lease``, or with lease 0 in its prefix cache; ``remote`` is what an engine that moves KV by
    itself said of them.
    """

    rid: U64
    attempt: U8
    epoch: U64
    model: Name
    prompt_len: U32
    tokens: Annotated[bytes, Cap(MAX_PROMPT_BYTES)]
    params: Annotated[bytes, Cap(256 * 1024)]
    whole: bool = False
    traceparent: Annotated[str, Cap(64)] = ""
    rank: U8 = 0
    uncached: U32 = 0
    hand_over: bool = False
    source: IdStr = ""
    source_epoch: U64 = 0
    lease: U64 = 0
    pull: U32 = 0
    remote: Annotated[bytes, Cap(MAX_REMOTE)] = b""


@message(REQUESTS, 4)
@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop these (rid, attempt); no answer. Unknown ones are ignored."""

    requests: Annotated[tuple[tuple[U64, U8], ...], Cap(MAX_OPEN)]


FINISHES = ("", "stop", "length", "abort", "error")
"""How a delta may end its request; "" goes on. On the wire, the index."""


class Delta(NamedTuple):
    """Tokens of one request from one engine step, or a few (a NamedTuple: it is built up to 200,000 times a second).

    ``offset`` counts generated tokens, those of earlier attempts included; a hole means frames were lost.  ``finish``
    is one of :data:`FINISHES`.  ``cached`` is the number of prompt tokens found in the prefix cache,
    told with the first delta.  ``logprobs`` is empty or :func:`p2pdyn.wire.codec.encode_logprobs` of one entry a token.
    """

    rid: U64
    attempt: U8
    offset: U32
    tokens: Annotated[tuple[U32, ...], Cap(MAX_STEP_TOKENS)]
    finish: Annotated[str, Cap(8)] = ""
    cached: U32 = 0
    logprobs: Annotated[bytes, Cap(4 * 2**20)] = b""


Row = tuple[int, int, int, tuple[int, ...], str, int, bytes]
"""A Delta, or the plain tuple of its fields: equal, and made at half the cost."""


@message(REQUESTS, 5)
@dataclass(frozen=True, slots=True)
class Tokens:
    """All deltas of one engine step, or of a millisecond of steps, for one frontend."""

    epoch: U64
    deltas: Annotated[tuple[Delta, ...], Cap(MAX_OPEN)]


@message(REQUESTS, 6)
@dataclass(frozen=True, slots=True)
class Refused:
    """A generate that will not run. ``code``: epoch, model, draining, overload, invalid, engine,
    stalled; the last two say that nothing of this worker goes on."""

    rid: U64
    attempt: U8
    code: Annotated[str, Cap(16)]
    reason: Sentence


@message(REQUESTS, 7)
@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent each :data:`p2pdyn.constants.STREAM_HEARTBEAT_S` to a frontend with open streams, by the peer process and
    so independent of the engine. ``open`` lists the rids that the worker still knows; ``step`` counts engine steps, so
    that an engine that stands still shows."""

    epoch: U64
    step: U64
    open: Annotated[tuple[U64, ...], Cap(MAX_OPEN)]


@message(REQUESTS, 8)
@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for bytes [offset, offset + CHUNK) of an object: ``what`` is card (key: its hash) or, later, snapshot."""

    ticket: U32
    what: Annotated[str, Cap(16)]
    key: Annotated[str, Cap(64)]
    offset: U64


@message(REQUESTS, 9)
@dataclass(frozen=True, slots=True)
class Chunk:
    """Answer to a Fetch; ``total`` is the object's size, or -1 if the worker does not have it."""

    ticket: U32
    offset: U64
    total: I64
    data: Annotated[bytes, Cap(CHUNK)]


# Transfers: a borrower's DEALER to the owner's ROUTER (docs/design/kv-transfer.md). ``epoch`` is the owner's in each.


@message(REQUESTS, 10)
@dataclass(frozen=True, slots=True)
class Prefilled:
    """Answer to a generate with ``hand_over``: the prompt's first ``blocks`` full blocks are held under ``lease`` (0:
    they could not be, whoever goes on computes) for LEASE_S from now. ``cached`` counts prompt tokens found cached."""

    rid: U64
    attempt: U8
    epoch: U64
    lease: U64
    blocks: U32
    cached: U32 = 0
    remote: Annotated[bytes, Cap(MAX_REMOTE)] = b""


@message(REQUESTS, 11)
@dataclass(frozen=True, slots=True)
class Claim:
    """Which blocks hold ``keys`` (:data:`KEY` bytes each)? With a prefill's ``lease``, or 0: hold what is cached."""

    ticket: U32
    lease: U64
    epoch: U64
    keys: Annotated[bytes, Cap(KEY * MAX_BLOCKS)]


@message(REQUESTS, 12)
@dataclass(frozen=True, slots=True)
class Granted:
    """Answer to a Claim: blocks and their generations (little-endian u32 each) of a prefix of the keys, held under
    ``lease``; none of either: refused, for ``reason``."""

    ticket: U32
    lease: U64
    blocks: Annotated[bytes, Cap(4 * MAX_BLOCKS)]
    generations: Annotated[bytes, Cap(4 * MAX_BLOCKS)]
    reason: Sentence = ""


@message(REQUESTS, 13)
@dataclass(frozen=True, slots=True)
class Renew:
    """The borrower lives and still wants ``lease``."""

    lease: U64
    epoch: U64


@message(REQUESTS, 14)
@dataclass(frozen=True, slots=True)
class Renewed:
    """Answer to a Renew; not ``held``: the lease has ended."""

    lease: U64
    held: bool


@message(REQUESTS, 15)
@dataclass(frozen=True, slots=True)
class Commit:
    """The read is over: was ``lease`` held throughout? Ends it."""

    ticket: U32
    lease: U64
    epoch: U64


@message(REQUESTS, 16)
@dataclass(frozen=True, slots=True)
class Committed:
    """Answer to a Commit."""

    ticket: U32
    held: bool


@message(REQUESTS, 17)
@dataclass(frozen=True, slots=True)
class Return:
    """The borrower gives ``lease`` up, and none of its reads is under way any more."""

    lease: U64
    epoch: U64


@message(REQUESTS, 18)
@dataclass(frozen=True, slots=True)
class Move:
    """From a worker that drains: these (rid, attempt) should go on elsewhere, if they can. Sent again and again while
    they are open here."""

    epoch: U64
    requests: Annotated[tuple[tuple[U64, U8], ...], Cap(MAX_OPEN)]


_PARAMS = tuple(SamplingParams.__slots__)
_params_of = attrgetter(*_PARAMS)
_DEFAULTS = _params_of(SamplingParams())


def describe_params(params: SamplingParams) -> dict[str, object]:
    """The fields that differ from their defaults: what travels in ``Generate.params``."""
    values = _params_of(params)
    return dict(compress(zip(_PARAMS, values, strict=True), map(ne, values, _DEFAULTS)))
