"""The frontend's end of the KV streams: batches and digests in, fetches out, the index kept.

docs/design/kv-events.md is the protocol; decisions are in :mod:`p2pdyn.core.kvstream`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.kvsignals import Fetch, Fetched, FetchFailed, Lost, Tick, Up
from p2pdyn.core.kvstream import EXACT, Event, KvStream
from p2pdyn.core.types import NodeId
from p2pdyn.net.kv_source import hex_blocks
from p2pdyn.wire.events import KvBatch, KvDigest
from p2pdyn.wire.kvbatch import RANK_AT

log = logging.getLogger(__name__)

SWEEP = 16384
"""Index entries looked at each tick for targets that left: a few milliseconds."""

Key = tuple[NodeId, int]
"""(worker, data-parallel rank)."""


class Source(Protocol):
    """A worker's link, as far as it matters here."""

    worker: NodeId

    async def fetch(self, what: str, key: str) -> bytes:
        """Raises LookupError if the worker does not keep it, TimeoutError, ConnectionError."""


class KvFeed:
    """All streams of one frontend. ``on_slot(key, slot)`` tells where in the index a target's blocks are, None while
    they are nowhere."""

    def __init__(self, index: KvIndex, on_slot: Callable[[Key, int | None], None]) -> None:
        self.index = index
        self.streams: dict[Key, KvStream] = {}
        self._on_slot = on_slot
        self._loop = asyncio.get_running_loop()
        self._sources: dict[NodeId, Source] = {}
        self._queues: dict[NodeId, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: dict[Key, tuple[int | None, str]] = {}  # the slot and state that were told of
        self._busy: set[Key] = set()
        self.retired: Counter[str] = Counter()
        """Counters of streams that are no more."""

    def up(self, source: Source, ranks: int) -> None:
        """A worker's links stand; its batches have been coming since before."""
        self._sources[source.worker] = source
        self._queues[source.worker] = asyncio.Lock()
        for rank in range(ranks):
            key = (source.worker, rank)
            if key not in self.streams:
                self.streams[key] = KvStream(self.index, rank)
            self._handle(key, self.streams[key], Up())

    def lost(self, worker: NodeId) -> None:
        """The worker is dead or its link is down: its blocks leave at once."""
        self._sources.pop(worker, None)
        self._queues.pop(worker, None)
        for key in [key for key in self.streams if key[0] == worker]:
            self._handle(key, self.streams[key], Lost())
            self.retired.update(asdict(self.streams.pop(key).counters))
            self._told.pop(key, None)

    def take(self, worker: NodeId, data: bytes) -> bool:
        """A message from the worker's event link, as it came: whether all that it wants has been done, as with almost
        every KvBatch. If not it is to be decoded, and may be for :meth:`received`."""
        try:
            stream = self.streams.get((worker, data[RANK_AT]))
        except IndexError:
            return False
        return stream is not None and stream.take(data)

    def received(self, worker: NodeId, message: KvBatch | KvDigest) -> None:
        """From the worker's event link."""
        key = (worker, message.rank)
        stream = self.streams.get(key)
        if stream is not None and message.worker == worker:
            self._handle(key, stream, message)

    def tick(self, now: float) -> None:
        """Several times a second."""
        for key, stream in list(self.streams.items()):
            due = stream.next_deadline()
            if due is not None and due <= now:
                self._handle(key, stream, Tick())
        self.index.sweep(SWEEP)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def of(self, worker: NodeId) -> Iterator[KvStream]:
        """The streams of a worker, by rank."""
        return (stream for (node, _), stream in sorted(self.streams.items()) if node == worker)

    def dump(self, worker: NodeId, rank: int) -> dict[str, Any]:
        """All that is believed of a target; LookupError if it is not followed. It walks the whole index."""
        stream = self.streams.get((worker, rank))
        if stream is None:
            raise LookupError(f"rank {rank} of worker {worker!r} is not followed here")
        held = self.index.held(stream.slot) if stream.slot is not None else set()
        return {"stream": stream.state, "epoch": stream.epoch, "seq": stream.seq, "blocks": hex_blocks(held)}

    def _handle(self, key: Key, stream: KvStream, event: Event) -> None:
        for fetch in stream.handle(event, self._loop.time()):
            self._start(key, fetch)
        if self._told.get(key) != (stream.slot, stream.state):
            self._tell(key, stream)
        if stream.state != EXACT and stream.next_deadline() == 0.0 and key not in self._busy:
            self._busy.add(key)
            self._loop.call_soon(self._slice, key)

    def _slice(self, key: Key) -> None:
        """The next part of a snapshot or replay, with a turn of the loop between any two."""
        self._busy.discard(key)
        if key in self.streams:
            self._handle(key, self.streams[key], Tick())

    def _tell(self, key: Key, stream: KvStream) -> None:
        slot, was = self._told.get(key, (None, None))
        self._told[key] = stream.slot, stream.state
        if stream.slot != slot:
            self._on_slot(key, stream.slot)
        if stream.state == was:
            return
        why = f": {stream.why}" if stream.why else ""
        level = logging.DEBUG if stream.state == EXACT or was is None else logging.INFO
        log.log(level, "KV stream of worker %s rank %d is %s%s", *key, stream.state, why)

    def _start(self, key: Key, fetch: Fetch) -> None:
        source = self._sources.get(key[0])
        if source is None:
            self._loop.call_soon(self._answered, key, FetchFailed(fetch.ticket))
            return
        task = self._loop.create_task(self._fetch(key, source, self._queues[key[0]], fetch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, key: Key, source: Source, queue: asyncio.Lock, fetch: Fetch) -> None:
        """One bulk object at a time from each worker, so that tokens pass between its chunks."""
        answer: Fetched | FetchFailed
        try:
            async with queue:
                answer = Fetched(fetch.ticket, await source.fetch(fetch.what, fetch.key))
        except LookupError:
            answer = Fetched(fetch.ticket, None)
        except (ConnectionError, TimeoutError) as error:
            log.debug("%s %s from worker %s: %s", fetch.what, fetch.key, key[0], error)
            answer = FetchFailed(fetch.ticket)
        if self._sources.get(key[0]) is source:
            self._answered(key, answer)

    def _answered(self, key: Key, answer: Fetched | FetchFailed) -> None:
        if key in self.streams:
            self._handle(key, self.streams[key], answer)
