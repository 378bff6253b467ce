"""The worker's end of the request and event links: frames in, engine steps out.

Decisions are in :mod:`p2pdyn.core.served`; this shell owns the ROUTER, the XPUB and one timer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from p2pdyn.constants import (
    EVENT_MAX,
    LOAD_EVENT_S,
    ORPHAN_S,
    REQUEST_MAX,
    STREAM_HEARTBEAT_S,
)
from p2pdyn.core.disagg import PULL_BPS
from p2pdyn.core.handed import HandedOver
from p2pdyn.core.lease import QUARANTINED
from p2pdyn.core.load_meter import LoadMeter
from p2pdyn.core.served import Running, Served
from p2pdyn.core.types import Address, Load, NodeId, only_pulls
from p2pdyn.engines import base
from p2pdyn.engines.runner import Runner
from p2pdyn.net.intake import Intake
from p2pdyn.net.kv_source import KvSource
from p2pdyn.net.load_events import LoadEvents
from p2pdyn.net.sockets import Sockets
from p2pdyn.wire.codec import WireError, decode, decode_params, encode, encode_logprobs, encode_tokens
from p2pdyn.wire.events import TOPIC_LOAD
from p2pdyn.wire.requests import (
    CHUNK,
    Cancel,
    Chunk,
    Claim,
    Commit,
    Fetch,
    Generate,
    Heartbeat,
    Hello,
    Move,
    Prefilled,
    Refused,
    Renew,
    Return,
    Welcome,
)
from p2pdyn.wire.schema import REQUESTS

if TYPE_CHECKING:
    from p2pdyn.net.engine_events import EngineEvents
    from p2pdyn.net.transfers import Transfers

log = logging.getLogger(__name__)

TICK_S = min(STREAM_HEARTBEAT_S, LOAD_EVENT_S)
STEPS_S = 0.001
"""Engine steps that follow each other faster than this share a message: each costs both peers a wake-up of two threads.
A step after a pause is sent at once, so that an engine with steps longer than this is never held up."""
CLOCK_JUMP_S = 2.0
"""A tick this late means that this process stood still (SIGSTOP, a suspended host), not that its frontends did."""


class WorkerService:
    """Binds at once, so that its ports can be announced; serves from :meth:`serve` on. ``owner_epoch`` gives the epoch
    of a live member, 0 for any other."""

    def __init__(
        self,
        sockets: Sockets,
        node: NodeId,
        epoch: int,
        requests: Sequence[Address],
        events: Sequence[Address],
        owner_epoch: Callable[[NodeId], int] = lambda node: 0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._node = node
        self._epoch = epoch
        self._owner_epoch = owner_epoch
        self._served: Served | None = None
        self._runner: Runner | None = None
        self._card: tuple[str, bytes] = ("", b"")
        self._moves_kv = ""
        self._batch = 0
        """Sequences that the engine runs at a time."""
        self._handed = HandedOver()
        self._computing: set[int] = set()
        """Prompts that were handed over before they were computed."""
        self.kv: KvSource | None = None
        self.transfers: Transfers | None = None
        self._engine_events: EngineEvents | None = None
        self._meter = LoadMeter(node)
        self._load_events = LoadEvents(self._publish_load, lambda: self.open > 0)
        self._intake = Intake(self._load_events.submitted)
        self._stalled: list[int] = []
        """What the engine had when it began to stand still."""
        self._ticked = self._loop.time()
        self._router = sockets.router(requests, self._receive, max_size=REQUEST_MAX, batch_done=self._intake.batch_done)
        self._events = sockets.xpub(events, max_size=EVENT_MAX)
        self._timer = self._loop.call_later(TICK_S, self._tick)
        self.malformed = 0
        self._send_timer: asyncio.TimerHandle | None = None
        self._sent = 0.0
        self.requests_total = 0

    @property
    def requests_port(self) -> int:
        return self._router.addresses[0].port

    @property
    def events_port(self) -> int:
        return self._events.addresses[0].port

    def serve(self, runner: Runner, info: base.EngineInfo, models: Sequence[str], card_digest: str) -> None:
        """The engine has loaded: take requests."""
        max_open = max(1024, 4 * info.max_num_seqs)
        self._served = Served(self._epoch, models, info.context, max_open)
        self._runner = self._intake.runner = runner
        self._card = (card_digest, info.card)
        self._batch = info.max_num_seqs
        self._moves_kv = info.moves_kv
        if self.kv is not None:
            self.kv.flush()
        if info.kv_events:
            self.kv = KvSource(self._node, self._epoch, info.block_size, info.ranks, self._publish)
            if info.publishers:
                self._follow(self.kv, info)

    def _follow(self, source: KvSource, info: base.EngineInfo) -> None:
        """The engine tells what it caches on sockets of its own."""
        from p2pdyn.net.engine_events import EngineEvents, Publisher  # few engines do

        publishers = [Publisher(*places, rank=rank) for rank, places in enumerate(info.publishers)]
        self._engine_events = EngineEvents(self._sockets, publishers, info.block_size, source.take)

    def set_epoch(self, epoch: int) -> None:
        """Membership has raised this node's epoch above that of another life of its id. Frontends take that for a
        restart: they come back on new links, and ask for the new one."""
        self._epoch = epoch
        if self._served is not None:
            self._served.epoch = epoch
        if self.transfers is not None:
            self.transfers.raise_epoch(epoch)
        if self.kv is not None:
            self.kv.raise_epoch(epoch)

    @property
    def load(self) -> Load:
        return self._runner.load if self._runner is not None else Load()

    @property
    def generated_tokens(self) -> int:
        return self._served.tokens if self._served is not None else 0

    @property
    def open(self) -> int:
        return len(self._served.running) if self._served is not None else 0

    @property
    def leases(self) -> int:
        """On KV blocks that others may still take."""
        if self.transfers is None:
            return self._handed.recent(monotonic())
        return sum(lease.state != QUARANTINED for lease in self.transfers.lender.leases.values())

    def drain(self) -> None:
        """Refuse new requests; those that run go on."""
        if self._served is not None:
            self._served.draining = True

    def move(self) -> None:
        """Ask every frontend to take its requests elsewhere."""
        if self._served is not None:
            for connection, requests in self._served.requests().items():
                self._send(connection, encode(Move(self._epoch, requests)))

    def end(self, code: str, reason: str) -> None:
        """Tell every frontend that its requests do not go on here, so that they do elsewhere at once."""
        if self._served is not None:
            self._send_due(held_back=True)
            for running in self._served.all_failed():
                self._refuse(running.connection, running, code, reason)

    @property
    def patience_s(self) -> float:
        """Seconds without a step after which the engine stands still."""
        return self._meter.patience_s

    def stall(self, reason: str) -> None:
        """The engine stands still: what it has goes on elsewhere, and it gets nothing more until :meth:`resume`."""
        if self._served is not None:
            log.error("%s: its requests go elsewhere", reason)
            self._stalled += self._served.running
            self._served.stalled = reason
            self.end("stalled", reason)

    def resume(self) -> None:
        """The engine has stepped again. Only now is it told that nobody waits for what it had: until then its having
        work is what tells that it stands still."""
        if self._served is not None:
            self._served.stalled = ""
        stalled, self._stalled = self._stalled, []
        self._abort(stalled)
        self._intake.batch_done()

    def engine_died(self, reason: str) -> None:
        if self._served is None:
            return
        log.error("the engine died: %s", reason)
        self.end("engine", reason)
        self._meter.clear()
        self._served = None
        if self.transfers is not None:
            self.transfers.engine_died()

    def close(self) -> None:
        for timer in (self._timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        self._load_events.close()
        if self.kv is not None:
            self.kv.flush()
        if self._engine_events is not None:
            self._engine_events.close()
        self._router.close()
        self._events.close()

    # Frames in.

    def _receive(self, frames: list[bytes]) -> None:
        try:
            connection, data = frames
            message = decode(REQUESTS, data)
        except (ValueError, WireError) as error:
            self.malformed += 1
            log.debug("a malformed request message was dropped: %s", error)
            return
        handler = self._handlers.get(type(message))
        if handler is None:
            self.malformed += 1
        else:
            handler(self, connection, message)

    def _on_hello(self, connection: bytes, message: Hello) -> None:
        load = self.load
        if self._served is not None:
            self._served.hello(connection, message.frontend, self._loop.time())
        welcome = Welcome(self._node, self._epoch, load.active_requests, load.queued, load.kv_used, load.kv_total)
        self._send(connection, encode(welcome))

    def _on_generate(self, connection: bytes, message: Generate) -> None:
        if self._served is None:
            self._refuse(connection, message, "model", "the worker's engine is not ready")
            return
        try:
            params = decode_params(message.params)
        except WireError as error:
            self._refuse(connection, message, "invalid", str(error))
            return
        sequence, refused, aborts = self._served.admit(connection, message, params, self._loop.time())
        if aborts:
            self._abort(aborts)
        if refused is not None:
            self._send(connection, encode(refused))
        elif sequence is not None:
            if message.source:
                self._expect(sequence, message)
            self.requests_total += 1
            self._intake.add(sequence)
            self._meter.submitted(sequence.key, len(sequence.tokens), message.uncached, monotonic())
            if message.traceparent:
                log.debug("request %d, attempt %d: trace %s", message.rid, message.attempt, message.traceparent)

    def _expect(self, sequence: base.Sequence, message: Generate) -> None:
        """Another worker has KV blocks for it; if that one is not alive in the epoch named, they are computed here."""
        source, epoch = NodeId(message.source), message.source_epoch
        if sequence.remote:
            if self._owner_epoch(source) != epoch:
                sequence.remote = b""
            elif not only_pulls(self._moves_kv):  # else its time is the prompt's, which is computed meanwhile
                self._meter.pulls(sequence.key, len(sequence.tokens), monotonic())
        elif sequence.pull and (
            sequence.hand_over  # engines do one of the two at a time
            or self.transfers is None
            or not self.transfers.begin(sequence.key, source, epoch, message.lease)
        ):
            sequence.pull = 0

    def _on_cancel(self, connection: bytes, message: Cancel) -> None:
        if self._served is not None:
            self._abort(self._served.cancel(connection, message.requests))
        if self.transfers is not None:
            self.transfers.given_up(connection, message.requests)
        keys = self._handed.given_up(connection, message.requests)
        if keys and self._runner is not None:
            self._runner.transfer([base.Release(key) for key in keys])

    def _on_transfer(self, connection: bytes, message: Claim | Renew | Commit | Return) -> None:
        if self.transfers is not None:
            self.transfers.lend(connection, message)

    def _on_fetch(self, connection: bytes, message: Fetch) -> None:
        digest, card = self._card
        if message.what == "card" and message.key == digest and digest:
            answer = _chunk(message, card)
        elif message.what == "agent":
            answer = _chunk(message, self.transfers.describe() if self.transfers is not None else b"")
        elif message.what != "card" and self.kv is not None:
            answer = self.kv.answer(connection, message, self._loop.time())
        else:
            answer = Chunk(message.ticket, message.offset, -1, b"")
        self._send(connection, encode(answer))

    _handlers: dict[type, Callable[..., None]] = {  # noqa: RUF012
        Hello: _on_hello,
        Generate: _on_generate,
        Cancel: _on_cancel,
        Fetch: _on_fetch,
        Claim: _on_transfer,
        Renew: _on_transfer,
        Commit: _on_transfer,
        Return: _on_transfer,
    }

    def _abort(self, keys: list[int]) -> None:
        if not keys:
            return
        for key in keys:
            self._meter.gone(key)
        if self.transfers is not None:
            self.transfers.cancel(keys)
        self._intake.abort(keys)

    # Steps out.

    def on_step(self, step: base.Step) -> None:
        """One engine step: sent at once if it ends what runs or the last one was sent a while ago, else soon."""
        served = self._served
        if step.kv and self.kv is not None:
            self.kv.take(0, step.kv)
        for note in step.transfers:
            if isinstance(note, base.Held) and note.key >= 0:
                self._handed_over(note)
            elif self.transfers is not None:
                self.transfers.note(note)
        if served is None or not step.outputs:
            return
        freed = sum([bool(output.finish) for output in step.outputs]) if len(served.running) > self._batch else -1
        served.outputs(step.outputs)
        while served.refused:
            running, why = served.refused.pop()
            self._meter.gone(running.key)
            self._refuse(running.connection, running, "invalid", why)
        now = monotonic()
        self._meter.stepped(served.started, len(step.outputs), self.load.active_blocks, now, freed)
        served.started.clear()
        if now - self._sent >= STEPS_S or not served.generating:
            self._send_due()
        elif self._send_timer is None:
            self._send_timer = self._loop.call_later(STEPS_S, self._send_late)

    def _handed_over(self, held: base.Held) -> None:
        """A prompt to hand over is computed, or will be when it is taken: tell the frontend where its blocks are."""
        if held.key in self._computing:
            self._computing.discard(held.key)
            self._meter.computed(held.key, held.cached, monotonic())
            return
        running = self._served.handed_over(held.key) if self._served is not None else None
        if running is None:  # cancelled while that was on its way
            if self._runner is not None:
                self._runner.transfer([base.Release(held.key)])
            return
        lease, request = 0, (running.connection, running.rid, running.attempt)
        if self.transfers is not None:
            lease = self.transfers.handed_over(held, *request)
        elif held.params:
            self._handed.add(request, held.key, monotonic())
        elif self._runner is not None:  # --kv-transfer off, and a frontend that asks all the same
            self._runner.transfer([base.Release(held.key)])
        if held.computed:
            self._meter.computed(held.key, held.cached, monotonic())
        else:
            self._computing.add(held.key)
        blocks = len(held.blocks) if lease else 0
        answer = Prefilled(running.rid, running.attempt, self._epoch, lease, blocks, held.cached, held.params)
        self._send(running.connection, encode(answer))
        self._load_events.settle()

    def _refuse(self, connection: bytes, asked: Generate | Running, code: str, why: str) -> None:
        self._send(connection, encode(Refused(asked.rid, asked.attempt, code, why[:500])))

    def _send_late(self) -> None:
        self._send_timer = None
        if self._served is not None and self._served.due:
            self._send_due()

    def _send_due(self, held_back: bool = False) -> None:
        """One message a frontend."""
        served = self._served
        if served is None:
            return
        self._sent = monotonic()
        for connection, rows in served.take(encode_logprobs, held_back).items():
            self._send(connection, encode_tokens(self._epoch, rows))
        if self._load_events.settle() and self.kv is not None:
            self.kv.idle()

    def _publish(self, topic: bytes, data: bytes) -> None:
        self._events.send((topic, data))

    def answer(self, connection: bytes, message: object) -> None:
        """To whoever asked on the request link."""
        self._send(connection, encode(message))

    def _send(self, connection: bytes, data: bytes) -> None:
        if not self._router.send((connection, data)) and self._served is not None:
            # Unknown to the ROUTER, or so far behind that its queue is full: the frontend sees a hole, or is gone.
            self._abort(self._served.gone(connection))
            self._loop.call_soon(self._intake.batch_done)

    # Time.

    def _tick(self) -> None:
        now = self._loop.time()
        self._timer = self._loop.call_later(TICK_S, self._tick)
        late, self._ticked = now - self._ticked > CLOCK_JUMP_S, now
        if self._served is None:
            return
        if self.kv is not None:
            self.kv.tick(now)
        self._send_due(held_back=True)
        self._heartbeat(self._served)
        self._load_events.tell()
        if self.transfers is not None:
            self.transfers.tick(now)
        if not late:
            orphans = self._served.orphans(now - ORPHAN_S)
            if orphans:
                log.info("cancelled %d requests of frontends that went silent", len(orphans))
                self._abort(orphans)
                self._intake.batch_done()

    def _heartbeat(self, served: Served) -> None:
        steps = self._runner.steps if self._runner is not None else 0
        for connection, known in list(served.connections.items()):
            if known.open:
                self._send(connection, encode(Heartbeat(self._epoch, steps, tuple(known.open))))

    def _moves(self) -> tuple[int, float]:
        """What it takes to move this worker's KV blocks, and others' to it: bytes a block, and a rate (LoadEvent)."""
        if self._moves_kv:
            return 0, self._meter.pull_bps(monotonic())
        if self.transfers is None:
            return 0, 0.0
        return self.transfers.block_bytes, self.transfers.bandwidth or PULL_BPS

    def _publish_load(self) -> None:
        event = self._meter.event(self._epoch, self.load, self.open, *self._moves(), monotonic(), self._batch)
        self._events.send((TOPIC_LOAD, encode(event)))


def _chunk(asked: Fetch, data: bytes) -> Chunk:
    """Part of ``data``, or that there is none."""
    return Chunk(asked.ticket, asked.offset, len(data) or -1, data[asked.offset : asked.offset + CHUNK])
