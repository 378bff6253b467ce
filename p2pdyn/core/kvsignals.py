"""What goes into a :class:`p2pdyn.core.kvstream.KvStream` beside the worker's messages, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Up:
    """The subscription stands: batches sent from now on will come."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is dead, left, or its link is down. Its blocks are found no more; nothing is fetched before Up."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Answer to the fetch ``ticket``; ``data`` None: the worker does not keep it."""

    ticket: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """No answer will come to the fetch ``ticket``. Each fetch must end as this, as Fetched, or with Lost."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask the worker for an object on its request link: ``what`` and ``key`` as in :class:`p2pdyn.wire.requests.Fetch`.
    The answers to earlier tickets of this stream are of no use any more."""

    ticket: int
    what: str
    key: str


@dataclass(slots=True)
class Counters:
    """How often: a hole or silence was noticed; a digest differed; each kind of fetch was asked for; a fetch failed;
    a batch or an answer did not parse. ``ignored`` batches were duplicates or of an earlier epoch."""

    gaps: int = 0
    degraded: int = 0
    replays: int = 0
    snapshots: int = 0
    failed: int = 0
    malformed: int = 0
    ignored: int = 0
