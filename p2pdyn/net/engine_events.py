"""An engine's KV events, from its own publisher: one SUB and, while a replay is open, one DEALER a rank.

Engines speak plain ZeroMQ, and whoever reaches their port reads their prompts, so only this host's endpoints are
taken.  What to do is decided in :mod:`p2pdyn.core.engine_stream`, what the bytes mean in :mod:`p2pdyn.engines.kv_wire`.
A replay gets a DEALER of its own: answers to an earlier question cannot come in between.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from p2pdyn.core.engine_stream import Action, Apply, Clear, EngineStream
from p2pdyn.core.types import Address
from p2pdyn.engines.base import BlocksCleared, KvEvent
from p2pdyn.engines.kv_wire import DROPPED, END_SEQ, MAX_PAYLOAD, Decoder, split
from p2pdyn.net.link import Link
from p2pdyn.net.sockets import IpcAddress, Sockets

log = logging.getLogger(__name__)

PROBE_S = 5.0
"""Between two questions whether the last events were lost, while none comes."""
REPLAY_S = 2.0
"""Without an answer: engines look at their replay socket between two messages, or each 0.1 s."""
REPLAY_TRIES = 3
REPLAY_HIGH_WATER = 200_000
"""Answers queued here. An engine's replay socket drops what does not fit."""

EXPECTED = frozenset({"group", "keys"})
"""Dropped by design: told at level info."""

OnEvents = Callable[[int, list[KvEvent]], None]
"""``on_events(rank, events)``: in order, once each."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """Where one data-parallel rank publishes: ``tcp://127.0.0.1:PORT`` or ``ipc://PATH``. Without ``replay`` a lost
    message costs everything known of the rank."""

    events: str
    replay: str = ""
    topic: str = ""
    rank: int = 0

    def at_rank(self, rank: int) -> Publisher:
        """The publisher of another rank of the same engine: its ports lie ``rank`` above rank 0's."""
        shift = rank - self.rank
        return replace(self, events=_shifted(self.events, shift), replay=_shifted(self.replay, shift), rank=rank)


@dataclass(frozen=True, slots=True)
class EventsStatus:
    """A rank's stream. ``state``: down, replaying, exact or degraded. ``problem``: a sentence, or empty."""

    rank: int
    state: str
    problem: str
    seq: int
    restarts: int
    lost: int
    dropped: dict[str, int]


class EngineEvents:
    """Follows the publishers of one engine until :meth:`close`. Raises ValueError with a sentence for an endpoint that
    is not this host's. ``block_size`` is the engine's, in tokens."""

    def __init__(self, sockets: Sockets, publishers: Sequence[Publisher], block_size: int, on_events: OnEvents) -> None:
        places = [
            (one, local_endpoint(one.events), local_endpoint(one.replay) if one.replay else None) for one in publishers
        ]
        self._streams = [_Stream(sockets, *place, Decoder(block_size), on_events) for place in places]

    def status(self) -> list[EventsStatus]:
        return [stream.status() for stream in self._streams]

    def close(self) -> None:
        """Nothing is told any more. Idempotent."""
        for stream in self._streams:
            stream.close()


class _Stream:
    def __init__(
        self,
        sockets: Sockets,
        publisher: Publisher,
        events: Address,
        replay: Address | None,
        decoder: Decoder,
        on_events: OnEvents,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._publisher = publisher
        self._replay_at = replay
        self._decoder = decoder
        self._on_events = on_events
        self._cursor = EngineStream()
        self._ready: list[KvEvent] = []
        self._up = self._closed = False
        self._down_reason = f"no connection to {publisher.events} yet"
        self._failures = 0
        self._told: set[str] = set()
        self._replay: Link | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard = self._answered = self._loop.time()
        self._link = sockets.sub(
            events,
            self._live,
            [publisher.topic.encode()],
            max_size=MAX_PAYLOAD,
            batch_done=self._flush,
            on_up=self._connected,
            on_down=self._disconnected,
            plain=True,
        )

    def status(self) -> EventsStatus:
        cursor, decoder = self._cursor, self._decoder
        state = cursor.state if self._up else "down"
        problem = decoder.error or cursor.degraded or ("" if self._up else self._down_reason)
        dropped = dict(decoder.dropped)
        return EventsStatus(
            self._publisher.rank, state, problem, cursor.next - 1, cursor.restarts, cursor.lost, dropped
        )

    def close(self) -> None:
        self._closed = True
        self._link.close()
        self._end_replay()

    # ---- the live stream

    def _connected(self) -> None:
        self._up = True
        self._failures = 0
        self._do(self._cursor.connected())
        self._flush()

    def _disconnected(self, reason: str) -> None:
        if self._up:
            log.warning("engine events of rank %d: %s", self._publisher.rank, reason)
        self._up, self._down_reason = False, reason
        self._cursor.disconnected()
        self._end_replay()

    def _live(self, frames: list[bytes]) -> None:
        self._heard = self._loop.time()
        message = split(frames)
        if message is None or message[0] == END_SEQ:
            self._decoder.dropped["unreadable"] += 1
            return
        seq, payload = message
        self._do(self._cursor.message(seq, payload, hash(payload)))

    # ---- the replay

    def _ask(self, first: int) -> None:
        self._end_replay()
        if not self._up:  # it is asked again once it is
            return
        if self._replay_at is None:
            self._do(self._cursor.replay_failed())
            return
        link = self._sockets.dealer(
            self._replay_at,
            self._answer,
            max_size=MAX_PAYLOAD,
            batch_done=self._flush,
            on_up=lambda: self._question(link, first),
            high_water=REPLAY_HIGH_WATER,
            plain=True,
        )
        self._replay = link
        self._answered = self._loop.time()
        self._again(REPLAY_S, self._wait)

    def _question(self, link: Link, first: int) -> None:
        if link is self._replay:
            link.send((b"", first.to_bytes(8, "big")))

    def _answer(self, frames: list[bytes]) -> None:
        message = split(frames)
        if message is None:
            self._decoder.dropped["unreadable"] += 1
            return
        link = self._replay
        self._failures = 0
        self._answered = self._loop.time()
        seq, payload = message
        if seq == END_SEQ:
            self._end_replay()
            self._do(self._cursor.replay_ended())
        else:
            self._do(self._cursor.replayed(seq, payload, hash(payload)))
        if self._replay is not link:  # a closed link tells no end of its batch
            self._flush()

    def _wait(self) -> None:
        left = self._answered + REPLAY_S - self._loop.time()
        if left > 0:
            self._again(left, self._wait)
            return
        self._end_replay()
        self._failures += 1
        if self._failures < REPLAY_TRIES:
            self._do(self._cursor.replay_stalled())
        else:
            self._failures = 0
            self._do(self._cursor.replay_failed())
        self._flush()

    def _end_replay(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._replay is not None:
            self._replay.close()
            self._replay = None

    def _probe(self) -> None:
        left = self._heard + PROBE_S - self._loop.time()
        if left > 0:
            self._again(left, self._probe)
            return
        self._heard = self._loop.time()
        self._do(self._cursor.probe())

    def _again(self, delay: float, call: Callable[[], None]) -> None:
        """One timer serves: it watches an open replay, or waits for the next probe."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay, call)

    # ---- both

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Apply):
                self._apply(action.payload)
            elif isinstance(action, Clear):
                self._ready.append(BlocksCleared())
            else:
                self._ask(action.first)
        if not self._cursor.asking:
            if self._replay is not None:
                self._end_replay()
            if self._timer is None and self._up and self._replay_at is not None:
                self._again(PROBE_S, self._probe)

    def _apply(self, payload: bytes) -> None:
        batch = self._decoder.decode(payload)
        self._ready += batch.events
        if batch.complete is not None:
            self._cursor.decoded(batch.complete)
        for reason in self._decoder.dropped.keys() - self._told:
            self._told.add(reason)
            level = logging.INFO if reason in EXPECTED else logging.WARNING
            log.log(level, "engine events of rank %d: %s; counted from now on", self._publisher.rank, DROPPED[reason])

    def _flush(self) -> None:
        if self._ready and not self._closed:
            events, self._ready = self._ready, []
            self._on_events(self._publisher.rank, events)


def local_endpoint(text: str) -> Address:
    """``tcp://`` with a loopback address, or ``ipc://``. Raises ValueError with a sentence for anything else."""
    kind, _, rest = text.partition("://")
    if kind == "ipc" and rest:
        return IpcAddress(rest)
    if kind == "tcp" and "*" not in rest:
        address = Address.parse(rest)
        with suppress(ValueError):
            if address.host == "localhost" or ipaddress.ip_address(address.host).is_loopback:
                return address
    raise ValueError(
        f"{text!r} is not an endpoint of this host, and engine events travel unencrypted: give tcp://127.0.0.1:PORT or "
        "ipc://PATH"
    )


def _shifted(endpoint: str, shift: int) -> str:
    if not endpoint or not shift:
        return endpoint
    head, _, port = endpoint.rpartition(":")
    if not endpoint.startswith("tcp://") or not port.isdigit():
        raise ValueError(f"{endpoint!r} serves one data-parallel rank only: give a tcp:// endpoint")
    return f"{head}:{int(port) + shift}"
