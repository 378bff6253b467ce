"""The frontend's shell: links to workers, requests out, tokens in.

Decisions are in :mod:`p2pdyn.core.flight` (requests), :mod:`p2pdyn.core.catalog` (models) and
:mod:`p2pdyn.core.router_simple` (choice).  This class owns the links and one timer, and carries actions out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from p2pdyn.constants import LINK_IDLE_S, MODEL_KNOWN_S
from p2pdyn.core.catalog import Catalog
from p2pdyn.core.flight import Abandon, Action, Dispatch, Flights
from p2pdyn.core.request import Failure, Job, Logprobs, Rejected, Sink
from p2pdyn.core.router_simple import Policy
from p2pdyn.core.types import Address, Load, NodeId, PeerInfo
from p2pdyn.http.backend import Metric, ModelStatus
from p2pdyn.net.sockets import Sockets
from p2pdyn.net.worker_link import WorkerLink
from p2pdyn.text.card import ModelCard
from p2pdyn.wire.codec import WireError, decode_logprobs, encode, encode_params
from p2pdyn.wire.requests import Cancel, Generate, Heartbeat, Hello, Refused, Tokens

log = logging.getLogger(__name__)

TICK_S = 0.25
RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Before the first, second, ... new link to a worker whose link went down; the last one from there on."""

CARD_S = 20.0
"""Longest that a first request for a model waits for its card."""

SETTLE_S = 1.0
"""A worker may not have seen a request sent less than this before its heartbeat."""


class Dispatcher:
    """The mesh as the HTTP endpoint sees it: :class:`p2pdyn.http.backend.Backend`.

    ``eager`` opens the links to every worker at once; otherwise the first request for a model does.
    """

    def __init__(
        self,
        sockets: Sockets,
        node: NodeId,
        epoch: int,
        policy: Policy,
        *,
        eager: bool,
        suspect: Callable[[NodeId], None],
        report: Callable[[], dict[str, Any]],
        mesh_metrics: Callable[[], list[Metric]],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._hello = Hello(node, epoch)
        self._eager = eager
        self._suspect = suspect
        self._report = report
        self.on_batch: Callable[[], None] = lambda: None
        self._mesh_metrics = mesh_metrics
        self._peers: dict[NodeId, tuple[int, Address, PeerInfo]] = {}
        self._links: dict[NodeId, WorkerLink] = {}
        self._retry: dict[NodeId, tuple[int, float]] = {}
        self._wanted: dict[str, float] = {}
        self._cards: dict[str, ModelCard] = {}
        self._fetching: dict[str, asyncio.Task[ModelCard]] = {}
        self.catalog = Catalog(MODEL_KNOWN_S)
        self.flights = Flights(policy, _logprobs)
        self.loads: dict[NodeId, Load] = {}
        self.links_lost = 0
        self._timer = self._loop.call_later(TICK_S, self._tick)

    # Backend.

    def models(self) -> list[ModelStatus]:
        offset = time.time() - self._loop.time()
        return [
            ModelStatus(m.name, len(m.workers), m.served.block_size, m.served.context, int(m.since + offset))
            for m in self.catalog.models.values()
        ]

    def context(self, model: str) -> int:
        known = self.catalog.models.get(model)
        return known.served.context if known is not None else 0

    def known_card(self, model: str) -> ModelCard | None:
        known = self.catalog.models.get(model)
        return None if known is None else self._cards.get(known.served.card)

    async def card(self, model: str) -> ModelCard:
        known = self.catalog.models.get(model)
        if known is None:
            raise Rejected(Failure(404, "model_not_found", self._unknown(model)))
        digest = known.served.card
        card = self._cards.get(digest)
        if card is not None:
            return card
        self._want(model)
        task = self._fetching.get(digest)
        if task is None:
            task = self._fetching[digest] = self._loop.create_task(self._fetch_card(model, digest))
            task.add_done_callback(lambda done: self._card_done(digest, done))
        try:
            return await asyncio.wait_for(asyncio.shield(task), CARD_S)
        except (TimeoutError, LookupError, ConnectionError) as error:
            message = f"Model {model!r} has no ready worker that gives its model card; retry in a moment."
            raise Rejected(Failure(503, "no_ready_worker", message, 1)) from error

    def submit(self, job: Job, sink: Sink) -> int:
        known = self.catalog.models.get(job.model)
        if known is None:
            raise Rejected(Failure(404, "model_not_found", self._unknown(job.model)))
        if not known.workers:
            message = f"Model {job.model!r} has no ready worker at present; retry in a moment."
            raise Rejected(Failure(503, "no_ready_worker", message, 1))
        if job.pin and job.pin not in known.workers:
            message = f"Worker {job.pin!r} (x-p2pdyn-pin) is not a ready worker of model {job.model!r}."
            raise Rejected(Failure(503, "no_ready_worker", message, 1))
        self._want(job.model)
        rid, actions = self.flights.submit(job, sink, self._loop.time())
        self._carry_out(actions)
        return rid

    def cancel(self, ticket: int) -> None:
        self._carry_out(self.flights.cancel(ticket))

    def peers(self) -> dict[str, Any]:
        return self._report()

    def readiness(self) -> tuple[bool, str]:
        if any(model.workers for model in self.catalog.models.values()):
            return True, "ready"
        return False, "no worker of any model is ready"

    def metrics(self) -> list[Metric]:
        flights = self.flights
        plain: list[tuple[str, str, str, float]] = [
            ("p2pdyn_frontend_inflight_requests", "gauge", "Open generations of this frontend.", len(flights.open)),
            ("p2pdyn_frontend_migrations_total", "counter", "Generations moved to another worker.", flights.migrations),
            (
                "p2pdyn_frontend_token_holes_total",
                "counter",
                "Generations whose token frames were lost.",
                flights.holes,
            ),
            ("p2pdyn_frontend_stale_frames_total", "counter", "Token frames of earlier attempts.", flights.stale),
            ("p2pdyn_frontend_links_lost_total", "counter", "Worker links that went down.", self.links_lost),
        ]
        rows: list[Metric] = [(name, kind, text, [({}, float(value))]) for name, kind, text, value in plain]
        workers = [({"worker": str(worker)}, float(link.up)) for worker, link in self._links.items()]
        rows.append(("p2pdyn_frontend_worker_link_up", "gauge", "1 while requests can be sent to the worker.", workers))
        active = [({"worker": str(worker)}, float(load.active_requests)) for worker, load in self.loads.items()]
        rows.append(("p2pdyn_worker_active_requests", "gauge", "As the worker last reported.", active))
        return rows + self._mesh_metrics()

    # The mesh.

    def refresh(self, alive: Iterable[tuple[NodeId, int, Address, PeerInfo]]) -> None:
        """The view has changed: ``(node, epoch, control address, info)`` of every peer that is not dead or gone."""
        self._peers = {node: (epoch, address, info) for node, epoch, address, info in alive}
        now = self._loop.time()
        self.catalog.refresh(((node, peer[2]) for node, peer in self._peers.items()), now)
        for worker, link in list(self._links.items()):
            peer = self._peers.get(worker)
            if peer is None or peer[0] != link.epoch:
                self._drop(worker, "it is no longer a live member" if peer is None else "it was restarted")
        self._link_up_wanted(now)
        self._reroute(now)

    def close(self) -> None:
        self._timer.cancel()
        for task in self._fetching.values():
            task.cancel()
        for link in self._links.values():
            link.close()
        self._links.clear()

    # Links.

    def _want(self, model: str) -> None:
        fresh = model not in self._wanted
        self._wanted[model] = self._loop.time()
        if fresh:
            self._link_up_wanted(self._loop.time())

    def _wanted_workers(self) -> set[NodeId]:
        models = self.catalog.models
        names = models.keys() if self._eager else self._wanted.keys() & models.keys()
        return {worker for name in names for worker in models[name].workers}

    def _link_up_wanted(self, now: float) -> None:
        for worker in self._wanted_workers() - self._links.keys():
            _, not_before = self._retry.get(worker, (0, 0.0))
            peer = self._peers.get(worker)
            if peer is None or now < not_before:
                continue
            epoch, address, info = peer
            self._links[worker] = WorkerLink(
                self._sockets,
                self._hello,
                worker,
                epoch,
                Address(address.host, info.requests_port),
                Address(address.host, info.events_port),
                on_up=self._link_up,
                on_down=self._link_down,
                on_message=self._message,
                on_load=self._load,
                batch_done=self._batch_done,
            )

    def _link_up(self, link: WorkerLink) -> None:
        self._retry.pop(link.worker, None)
        log.debug("link to worker %s is up", link.worker)
        self._reroute(self._loop.time())

    def _link_down(self, link: WorkerLink, reason: str) -> None:
        if link.proven:
            log.warning("worker %s is suspect: %s", link.worker, reason)
            self._suspect(link.worker)
        else:
            log.debug("worker %s cannot be reached: %s", link.worker, reason)
        self._drop(link.worker, reason)

    def _drop(self, worker: NodeId, reason: str) -> None:
        link = self._links.pop(worker, None)
        if link is None:
            return
        link.close()
        self.links_lost += 1
        self.loads.pop(worker, None)
        now = self._loop.time()
        tries, _ = self._retry.get(worker, (0, 0.0))
        self._retry[worker] = (tries + 1, now + RETRY_S[min(tries, len(RETRY_S) - 1)])
        self._carry_out(self.flights.worker_lost(worker, f"worker {worker} was lost ({reason})", now))
        self._reroute(now)
        self.on_batch()

    def _reroute(self, now: float) -> None:
        serving = {
            name: [w for w in model.workers if (link := self._links.get(w)) is not None and link.up]
            for name, model in self.catalog.models.items()
        }
        self._carry_out(self.flights.routable(serving, now))

    # Messages.

    def _message(self, link: WorkerLink, message: Any) -> None:
        now = self._loop.time()
        kind = type(message)
        if kind is Tokens:
            if message.epoch == link.epoch:
                actions = self.flights.tokens(link.worker, message.deltas, now)
                if actions:
                    self._carry_out(actions)
        elif kind is Heartbeat:
            if message.epoch == link.epoch:
                self._carry_out(self.flights.missing_at(link.worker, message.open, now - SETTLE_S, now))
        elif kind is Refused:
            refused: Refused = message
            self._carry_out(
                self.flights.refused(link.worker, refused.rid, refused.attempt, refused.code, refused.reason, now)
            )

    def _load(self, worker: NodeId, load: Load) -> None:
        self.loads[worker] = load
        self.flights.report(worker, load)

    def _batch_done(self) -> None:
        self.on_batch()

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            link = self._links.get(action.worker)
            if link is None:
                continue
            if isinstance(action, Abandon):
                link.send(encode(Cancel(((action.rid, action.attempt),))))
            elif not link.send(self._generate(link.epoch, action)):
                # Not connected any more, or its queue is full: to us the worker is lost. Not from within this loop.
                self._loop.call_soon(self._unsent, link)

    def _unsent(self, link: WorkerLink) -> None:
        if self._links.get(link.worker) is link:
            self._link_down(link, "a request could not be sent to it")

    @staticmethod
    def _generate(epoch: int, action: Dispatch) -> bytes:
        job = action.job
        return encode(
            Generate(
                action.rid,
                action.attempt,
                epoch,
                job.model,
                len(job.tokens),
                action.tokens.tobytes(),
                encode_params(job.params),
                job.whole,
                job.traceparent,
            )
        )

    # Model cards.

    async def _fetch_card(self, model: str, digest: str) -> ModelCard:
        """From any worker whose link is up, one after the other, until one gives it."""
        last: Exception = LookupError(f"no worker of {model!r} is linked")
        deadline = self._loop.time() + CARD_S
        while self._loop.time() < deadline:
            known = self.catalog.models.get(model)
            links = [self._links[w] for w in (known.workers if known else ()) if w in self._links and self._links[w].up]
            for link in links:
                try:
                    packed = await link.fetch("card", digest)
                    card = ModelCard.unpack(packed)
                    if card.digest != digest:
                        raise LookupError(f"worker {link.worker} sent another card than {digest}")
                    return card
                except (LookupError, ConnectionError, TimeoutError, ValueError) as error:
                    log.warning("model card %s from worker %s: %s", digest, link.worker, error)
                    last = error
            await asyncio.sleep(0.05)
        raise last

    def _card_done(self, digest: str, task: asyncio.Task[ModelCard]) -> None:
        self._fetching.pop(digest, None)
        if not task.cancelled() and task.exception() is None:
            self._cards[digest] = task.result()

    def _unknown(self, model: str) -> str:
        names = ", ".join(sorted(self.catalog.models)) or "none yet"
        return f"The model {model!r} does not exist here; models: {names}."

    # Time.

    def _tick(self) -> None:
        now = self._loop.time()
        self._timer = self._loop.call_later(TICK_S, self._tick)
        for link in list(self._links.values()):
            link.tick(now, self.flights.open_at(link.worker) > 0)
        self._carry_out(self.flights.tick(now))
        self.catalog.expire(now)
        for model in [m for m, used in self._wanted.items() if now - used > LINK_IDLE_S]:
            del self._wanted[model]
        wanted = self._wanted_workers()
        for worker in self._links.keys() - wanted:
            if not self.flights.open_at(worker):
                self._links.pop(worker).close()
                self.loads.pop(worker, None)
                self._reroute(now)
        self._link_up_wanted(now)


def _logprobs(data: bytes) -> Logprobs:
    """Logprobs that cannot be read are left out; the tokens beside them are good."""
    try:
        return decode_logprobs(data)
    except WireError as error:
        log.warning("logprobs that cannot be read were left out: %s", error)
        return ()
