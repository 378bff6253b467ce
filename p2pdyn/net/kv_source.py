"""The worker's end of the KV streams: journals to the event link, answers to fetches on the request link.

docs/design/kv-events.md is the protocol; decisions are in :mod:`p2pdyn.core.kvjournal`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from p2pdyn.core.kvjournal import KvJournal
from p2pdyn.core.kvstream import DIGEST_S, EXACT, REPLAY, SNAPSHOT
from p2pdyn.core.types import NodeId
from p2pdyn.engines.base import KvEvent
from p2pdyn.wire.codec import encode
from p2pdyn.wire.events import TOPIC_DIGEST, TOPIC_KV
from p2pdyn.wire.requests import CHUNK, Chunk, Fetch

BATCH_S = 0.01
"""Steps that follow each other faster than this share a batch: each batch wakes two threads of every frontend. What
changes after a pause is told at once, so that an engine with steps longer than this is never held up; a frontend that
hears of a prompt this much later has predicted its blocks."""

CUT_S = 10.0
"""An object that is being read in chunks is kept for the reader this long after its last chunk."""

Key = tuple[bytes, str, str]


class KvSource:
    """One journal a data-parallel rank. ``publish(topic, message)`` sends to all that subscribe."""

    def __init__(
        self, node: NodeId, epoch: int, block_size: int, ranks: int, publish: Callable[[bytes, bytes], object]
    ) -> None:
        self.journals = [KvJournal(node, epoch, rank, block_size) for rank in range(ranks)]
        """What has been published, and nothing that has not."""
        self._loop = asyncio.get_running_loop()
        self._publish = publish
        self._pending: list[list[KvEvent]] = [[] for _ in range(ranks)]
        self._timer: asyncio.TimerHandle | None = None
        self._flushed = 0.0
        self._digested = [0] * ranks
        """The seq of each rank's last digest."""
        self._next_digest = 0.0
        self._cuts: dict[Key, tuple[float, bytes]] = {}

    def take(self, rank: int, events: Iterable[KvEvent]) -> None:
        """What one engine step changed."""
        self._pending[rank] += events
        if self._timer is None:
            wait = self._flushed + BATCH_S - self._loop.time()
            if wait <= 0.0:
                self.flush()
            else:
                self._timer = self._loop.call_later(wait, self.flush)

    def flush(self) -> None:
        """Publish what has been taken."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for journal, events in zip(self.journals, self._pending, strict=True):
            if not events:
                continue
            self._flushed = self._loop.time()
            batches = journal.take(events)
            events.clear()
            for batch in batches:
                self._publish(TOPIC_KV, encode(batch))

    def idle(self) -> None:
        """The engine has run out of work: nothing more will show that the last batch was lost, but a digest."""
        self.flush()
        for journal in self.journals:
            if self._digested[journal.rank] != journal.seq:
                self._digest(journal)

    def tick(self, now: float) -> None:
        """Several times a second."""
        if now >= self._next_digest:
            self._next_digest = now + DIGEST_S
            self.flush()
            for journal in self.journals:
                self._digest(journal)
            for key in [key for key, (since, _) in self._cuts.items() if since < now - CUT_S]:
                del self._cuts[key]

    def report(self) -> dict[str, Any]:
        """This worker's own streams, as `peers --json` has them: it cannot be wrong about itself."""
        self.flush()
        blocks = sum(journal.blocks for journal in self.journals)
        return {"stream": EXACT, "seq": max(j.seq for j in self.journals), "blocks": blocks, "why": ""}

    def dump(self, rank: int) -> dict[str, Any]:
        """All that a rank's cache holds; LookupError for a rank that there is not."""
        if not 0 <= rank < len(self.journals):
            raise LookupError(f"this worker has no rank {rank}")
        self.flush()
        journal = self.journals[rank]
        return {"stream": EXACT, "epoch": journal.epoch, "seq": journal.seq, "blocks": hex_blocks(journal.held())}

    def raise_epoch(self, epoch: int) -> None:
        """Membership gave this node a higher epoch: every stream begins anew."""
        self.flush()
        for journal in self.journals:
            journal.raise_epoch(epoch)

    def answer(self, connection: bytes, fetch: Fetch, now: float) -> Chunk:
        """A part of a snapshot or replay: made at offset 0, and the same object until it has been read to its end."""
        key = (connection, fetch.what, fetch.key.partition(":")[0])  # one of each kind and rank: bounded
        data = self._cut(fetch) if fetch.offset == 0 else self._cuts.get(key, (0.0, None))[1]
        if data is None:
            return Chunk(fetch.ticket, fetch.offset, -1, b"")
        end = fetch.offset + CHUNK
        if end < len(data):
            self._cuts[key] = (now, data)
        else:
            self._cuts.pop(key, None)
        return Chunk(fetch.ticket, fetch.offset, len(data), data[fetch.offset : end])

    def _cut(self, fetch: Fetch) -> bytes | None:
        try:
            rank, *rest = map(int, fetch.key.split(":"))
            journal = self.journals[rank] if rank >= 0 else None
        except (ValueError, IndexError):
            return None
        self.flush()  # fresh; the cut would be right without, as a journal holds what has been published
        if journal is not None and fetch.what == SNAPSHOT and not rest:
            return journal.snapshot()
        if journal is not None and fetch.what == REPLAY and len(rest) == 2:
            return journal.replay(*rest)
        return None

    def _digest(self, journal: KvJournal) -> None:
        self._digested[journal.rank] = journal.seq
        self._publish(TOPIC_DIGEST, encode(journal.digest()))


def hex_blocks(held: Iterable[tuple[int, int]]) -> dict[str, str]:
    """By tier, the sequence hashes in ascending order, 16 hex digits each, in one string."""
    tiers: dict[str, list[int]] = {}
    for one, tier in held:
        tiers.setdefault(str(tier), []).append(one)
    return {tier: "".join(f"{one:016x}" for one in sorted(hashes)) for tier, hashes in tiers.items()}
