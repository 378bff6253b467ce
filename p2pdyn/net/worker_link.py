"""The asking end of one worker's links: a DEALER for requests, and at a frontend a SUB for load and KV events.

A link is *up* from the worker's Welcome, which proves identity and epoch, to the first sign of trouble; it is never
reused after that, because a DEALER would deliver what it has queued for the dead worker to its successor.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from p2pdyn.constants import EVENT_MAX, HELLO_S, REQUEST_MAX, STREAM_HEARTBEAT_S, STREAM_SILENCE_S
from p2pdyn.core.types import Address, Load, NodeId
from p2pdyn.net.link import Link
from p2pdyn.net.sockets import Sockets
from p2pdyn.wire.codec import WireError, decode, encode
from p2pdyn.wire.events import TOPIC_DIGEST, TOPIC_KV, TOPIC_LOAD, KvBatch, KvDigest, LoadEvent
from p2pdyn.wire.requests import (
    Chunk,
    Committed,
    Fetch,
    Granted,
    Heartbeat,
    Hello,
    Move,
    Prefilled,
    Refused,
    Renewed,
    Tokens,
    Welcome,
)
from p2pdyn.wire.schema import EVENTS, REQUESTS

log = logging.getLogger(__name__)

IDLE_SILENCE_S = 3.5
"""Without open streams a worker only answers Hellos: three missed ones."""

DOUBT_S = 1.5
"""Silence of a worker with streams while no other one is heard either: it may be this host, and who would take them?"""

FETCH_S = 5.0
"""For one chunk of a bulk transfer."""

ANSWERS = frozenset((Tokens, Heartbeat, Refused, Prefilled, Move, Granted, Renewed, Committed))
"""What ``on_message`` hears of; the link itself takes the others."""


class WorkerLink:
    """Opens on construction, which raises OSError without descriptors. Callbacks are called on the event loop;
    ``on_down`` exactly once, unless closed before. ``take_kv`` sees events before they are decoded, and answers whether
    that is needed no more."""

    def __init__(
        self,
        sockets: Sockets,
        hello: Hello,
        worker: NodeId,
        epoch: int,
        requests: Address,
        events: Address | None,
        *,
        on_up: Callable[[WorkerLink], None],
        on_down: Callable[[WorkerLink, str], None],
        on_message: Callable[[WorkerLink, object], None],
        on_load: Callable[[NodeId, int, Load], None] | None = None,
        batch_done: Callable[[], None] | None = None,
        on_kv: Callable[[NodeId, KvBatch | KvDigest], None] | None = None,
        take_kv: Callable[[NodeId, bytes], bool] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.worker = worker
        self.epoch = epoch
        self.up = False
        self.up_since = 0.0
        self.proven = False
        """Has been up: what is said of it now is news."""
        self.broke = False
        """It went down because the connection was lost: the worker's process has ended, for all we know."""
        self.draining = False
        """The worker has said so: it takes nothing new, whatever gossip still has it as."""
        self.heard = self.opened = self._idle_at = self._loop.time()
        self._greeted = self._told = 0.0
        self._greetings = self._answered = self._needed = 0
        """Hellos sent and answered, and how many must be before the link can be trusted."""
        self._hello = encode(hello)
        self._closed = False
        self._on_up, self._on_down, self._on_message = on_up, on_down, on_message
        self._on_load, self._on_kv, self._take_kv = on_load, on_kv, take_kv
        self._fetches: dict[int, asyncio.Future[Chunk]] = {}
        self._ticket = 0
        self._load_seq = 0
        self.malformed = 0
        topics = (TOPIC_LOAD,) if on_kv is None else (TOPIC_LOAD, TOPIC_KV, TOPIC_DIGEST)
        self._events: Link | None = None
        if events is not None:
            self._events = sockets.sub(events, self._receive_event, topics, max_size=EVENT_MAX)
        try:
            self._requests: Link = sockets.dealer(
                requests,
                self._receive,
                max_size=REQUEST_MAX,
                batch_done=batch_done,
                on_up=self._greet,
                on_down=self._broke,
            )
        except OSError:
            if self._events is not None:
                self._events.close()
            raise

    def send(self, data: bytes) -> bool:
        return not self._closed and self._requests.send((data,))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.up = False
        self._requests.close()
        if self._events is not None:
            self._events.close()
        for future in self._fetches.values():
            future.cancel()

    def fresh(self, now: float) -> bool:
        """Something has been heard of it lately: an idle worker tells its load as often as a busy one its heartbeat."""
        return self._answered >= self._needed and now - max(self.heard, self._told) <= STREAM_SILENCE_S

    def patience_s(self, others: Iterable[WorkerLink], now: float) -> float:
        """How long the worker may be silent while it has streams."""
        heard = (max(one.heard, one._told) for one in others if one is not self and one.up)
        return STREAM_SILENCE_S if any(now - last <= 2 * STREAM_HEARTBEAT_S for last in heard) else DOUBT_S

    def doubt(self) -> None:
        """This process stood still: what is read now may have been sent long ago, on a connection that the worker has
        given up since. Trust the link when the worker has answered once more."""
        before = self._greetings
        self._greet()
        self._needed = before + 1

    def tick(self, now: float, busy: bool, absent: float = 0.0, patience_s: float = STREAM_SILENCE_S) -> None:
        """Each 0.25 s: greet, and notice silence. ``busy``: requests of ours are open there, and it may be silent for
        ``patience_s``. ``absent``: seconds for which this process stood still and heard nobody, which says nothing of
        the worker."""
        self.heard += absent
        self._told += absent
        if now - self._greeted >= HELLO_S:
            self._greet()
        if not busy:
            self._idle_at = now
        # An idle worker answers each second only: its silence before the first request says nothing.
        limit, since = (patience_s, self._idle_at) if busy and self.up else (IDLE_SILENCE_S, self.opened)
        if now - max(self.heard, since) > limit:
            self._down(f"nothing heard for {limit:g} s")

    async def fetch(self, what: str, key: str) -> bytes:
        """A bulk object in chunks, one outstanding. Raises LookupError if the worker lacks it, TimeoutError, or
        ConnectionError if the link goes down."""
        parts: list[bytes] = []
        offset, total = 0, 1
        while offset < total:
            chunk = await self._fetch_chunk(what, key, offset)
            total = chunk.total
            if total < 0 or chunk.offset != offset or (not chunk.data and offset < total):
                raise LookupError(f"worker {self.worker} does not have {what} {key}")
            parts.append(chunk.data)
            offset += len(chunk.data)
        return b"".join(parts)

    async def _fetch_chunk(self, what: str, key: str, offset: int) -> Chunk:
        self._ticket += 1
        ticket = self._ticket
        future: asyncio.Future[Chunk] = self._loop.create_future()
        self._fetches[ticket] = future
        try:
            if not self.send(encode(Fetch(ticket, what, key, offset))):
                raise ConnectionError(f"worker {self.worker} cannot be reached")
            return await asyncio.wait_for(future, FETCH_S)
        except asyncio.CancelledError:
            if self._closed:
                raise ConnectionError(f"the link to worker {self.worker} went down") from None
            raise
        finally:
            del self._fetches[ticket]

    def _greet(self) -> None:
        self._greeted = self._loop.time()
        self._greetings += self.send(self._hello)

    def _broke(self, reason: str) -> None:
        self.broke = self.up
        self._down(reason)

    def _down(self, reason: str) -> None:
        if self._closed:
            return
        self.close()
        self._on_down(self, reason)

    def _receive(self, frames: list[bytes]) -> None:
        if self._closed:
            return
        try:
            (data,) = frames
            message = decode(REQUESTS, data)
        except (ValueError, WireError) as error:
            self.malformed += 1
            log.debug("a malformed message from worker %s was dropped: %s", self.worker, error)
            return
        self.heard = self._loop.time()
        kind = type(message)
        if kind in ANSWERS:
            self._on_message(self, message)
        elif kind is Welcome:
            self._welcome(message)  # type: ignore[arg-type]
        elif kind is Chunk:
            future = self._fetches.get(message.ticket)  # type: ignore[attr-defined]
            if future is not None and not future.done():
                future.set_result(message)  # type: ignore[arg-type]
        else:
            self.malformed += 1

    def _welcome(self, message: Welcome) -> None:
        if message.worker != self.worker or message.epoch != self.epoch:
            self._down(f"worker {message.worker} of epoch {message.epoch} answers at its address")
            return
        self._answered += 1
        if not self.up:
            self.up = self.proven = True
            self.up_since = self._loop.time()
            self._on_up(self)

    def _receive_event(self, frames: list[bytes]) -> None:
        if self._closed:
            return
        try:
            _, data = frames
            if self._take_kv is not None and self._take_kv(self.worker, data):
                return
            event = decode(EVENTS, data)
        except (ValueError, WireError):
            self.malformed += 1
            return
        if isinstance(event, KvBatch | KvDigest):
            if self._on_kv is not None:
                self._on_kv(self.worker, event)
            return
        if isinstance(event, LoadEvent) and event.epoch == self.epoch and event.seq > self._load_seq:
            self._load_seq = event.seq
            self._told = self._loop.time()
            if self._on_load is not None:
                self._on_load(self.worker, event.rank, _load(event))


def _load(event: LoadEvent) -> Load:
    return Load(
        event.active_requests,
        event.active_blocks,
        event.queued,
        event.kv_used,
        event.kv_total,
        event.prefill_tokens_queued,
        event.prefill_tps,
        event.itl_ms,
        event.itl_per_block_ms,
        event.block_bytes,
        event.pull_bps,
        event.work_s,
        event.slots,
    )
