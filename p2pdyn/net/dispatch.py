"""The frontend's shell: links to workers, requests out, tokens in.

Decisions are in :mod:`p2pdyn.core.flight` (requests), :mod:`p2pdyn.core.catalog` (models),
:mod:`p2pdyn.core.router` (choice) and :mod:`p2pdyn.core.kvstream` (what workers hold).  This class owns the links and
one timer, and carries actions out.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

from p2pdyn.constants import LINK_IDLE_S, MODEL_KNOWN_S
from p2pdyn.core import router_tell
from p2pdyn.core.catalog import Catalog
from p2pdyn.core.flight import Flights
from p2pdyn.core.flight_parts import Abandon, Action
from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.request import Failure, Job, Logprobs, Rejected, Sink
from p2pdyn.core.router import Decision, Router
from p2pdyn.core.routes import HASHING, Endpoint, Key, Routes, Serving
from p2pdyn.core.types import PREFILL, Address, Load, NodeId, PeerInfo
from p2pdyn.http.backend import Metric, ModelStatus
from p2pdyn.http.metrics import Histogram
from p2pdyn.net.cards import Cards
from p2pdyn.net.dispatch_metrics import DECISION_S, frontend_metrics, kv_report, sum_loads
from p2pdyn.net.generate import generate
from p2pdyn.net.kv_feed import KvFeed
from p2pdyn.net.sockets import Sockets
from p2pdyn.net.worker_link import WorkerLink
from p2pdyn.text.card import ModelCard
from p2pdyn.wire.codec import WireError, decode_logprobs, encode
from p2pdyn.wire.requests import Cancel, Heartbeat, Hello, Move, Prefilled, Refused, Tokens

log = logging.getLogger(__name__)

TICK_S = 0.25
RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Before the first, second, ... new link to a worker whose link went down; the last one from there on."""

JOIN_S, JOIN_POLL_S = 2.0, 0.02
"""A frontend so young may not have heard of the model yet: it asks itself again before it answers 404."""

ABSENT_S = 0.5
"""A tick that comes this much too late was not kept up by work: this process stood still (SIGSTOP, a suspended host,
a starved one), and nobody's silence meanwhile says anything."""

ENGINE_CODES = ("engine", "stalled")
"""Of Refused: the engine has ended, or stands still."""

STEADY_S = 10.0
"""A link that stayed up this long is opened again at once when it breaks; a flapping one later each time."""

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
        policy: str,
        rng: random.Random,
        *,
        eager: bool,
        suspect: Callable[[NodeId], None],
        report: Callable[[], dict[str, Any]],
        mesh_metrics: Callable[[], list[Metric]],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._born = self._loop.time()
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
        self._died: dict[NodeId, int] = {}
        """Workers taken for dead as their connections broke, and their epochs."""
        self._quiet: set[NodeId] = set()
        """Of whom nothing has been heard for a moment: not routed to."""
        self._wanted: dict[str, float] = {}
        self._cards = Cards(self._links_of)
        self.catalog = Catalog(MODEL_KNOWN_S)
        self.index = KvIndex()
        self.router = Router(policy, rng, self.index)
        self.flights = Flights(Routes(self.router), _logprobs, self._decided)
        self.feed = KvFeed(self.index, self._placed)
        self._follows_kv = policy in HASHING
        self._decision = Histogram(
            "p2pdyn_router_decision_seconds", "Time to route a request, hashing its prompt included.", DECISION_S
        )
        self.loads: dict[Key, Load] = {}
        self.links_lost = 0
        self._draining = False
        self._ticked = self._born
        self._outbox: list[tuple[WorkerLink, bytes]] = []
        """Requests."""
        self._sending = False
        self._timer = self._loop.call_later(TICK_S, self._tick)

    # Backend.

    def models(self) -> list[ModelStatus]:
        offset = time.time() - self._loop.time()
        return [
            ModelStatus(m.name, m.ready, m.served.block_size, m.served.context, int(m.since + offset))
            for m in self.catalog.models.values()
        ]

    def context(self, model: str) -> int:
        known = self.catalog.models.get(model)
        return known.served.context if known is not None else 0

    def known_card(self, model: str) -> ModelCard | None:
        known = self.catalog.models.get(model)
        return None if known is None else self._cards.known(known.served.card)

    async def card(self, model: str) -> ModelCard:
        while (known := self.catalog.models.get(model)) is None:
            if self._loop.time() - self._born > JOIN_S:
                raise Rejected(Failure(404, "model_not_found", self._unknown(model)))
            await asyncio.sleep(JOIN_POLL_S)
        self._want(model)
        try:
            return await self._cards.get(model, known.served.card)
        except (TimeoutError, LookupError, ConnectionError, ValueError) as error:
            message = f"Model {model!r} has no ready worker that gives its model card; retry in a moment."
            raise Rejected(Failure(503, "no_ready_worker", message, 1)) from error

    def submit(self, job: Job, sink: Sink) -> int:
        known = self.catalog.models.get(job.model)
        if known is None:
            raise Rejected(Failure(404, "model_not_found", self._unknown(job.model)))
        if not known.ready:
            message = f"Model {job.model!r} has no ready worker at present; retry in a moment."
            if known.workers:
                message = f"Model {job.model!r} has prefill workers alone at present, which answer nothing."
            raise Rejected(Failure(503, "no_ready_worker", message, 1))
        if job.pin and known.roles.get(NodeId(job.pin), PREFILL) == PREFILL:
            message = f"Worker {job.pin!r} (x-p2pdyn-pin) is not a ready worker of model {job.model!r} that answers."
            raise Rejected(Failure(503, "no_ready_worker", message, 1))
        self._want(job.model)
        now = self._loop.time()
        began = time.perf_counter()
        rid, actions = self.flights.submit(job, sink, now)
        self._decision.observe(time.perf_counter() - began)
        self._carry_out(actions)
        return rid

    def cancel(self, ticket: int) -> None:
        self._carry_out(self.flights.cancel(ticket, self._loop.time()))

    def explain(self, job: Job) -> dict[str, Any] | None:
        """What would become of ``job`` now, as `p2pdyn explain --json` prints it; None if nobody may take it."""
        self._want(job.model)
        decision = self.flights.routes.explain(job, self._loop.time())
        return None if decision is None else router_tell.explanation(self.router, job.model, decision)

    def peers(self) -> dict[str, Any]:
        return self._report()

    def drain(self) -> None:
        """This endpoint is to go: it is not ready any more. What is open goes on."""
        self._draining = True

    def end(self, failure: Failure) -> None:
        """End all that is open with ``failure``."""
        self._carry_out(self.flights.end(failure, self._loop.time()))
        self.on_batch()

    def readiness(self) -> tuple[bool, str]:
        if self._draining:
            return False, "draining: this endpoint takes no new requests"
        models = self.catalog.models.values()
        concerns = "; ".join(filter(None, [model.concern() for model in models]))
        if any(model.ready for model in models):
            return True, concerns or "ready"
        return False, concerns or "no worker of any model is ready"

    def metrics(self) -> list[Metric | Histogram]:
        links = {worker: link.up for worker, link in self._links.items()}
        ours = frontend_metrics(self.flights, self.feed, self.loads, links, self.links_lost)
        return [*ours, self._decision, *self._mesh_metrics()]

    def loads_report(self) -> dict[NodeId, Load]:
        """Each worker's load as last reported, over all its ranks."""
        return sum_loads(self.loads)

    def streams_report(self) -> dict[NodeId, dict[str, Any]]:
        """Each worker's KV stream as this frontend sees it."""
        return kv_report(self.feed)

    # The mesh.

    def refresh(self, alive: Iterable[tuple[NodeId, int, Address, PeerInfo]]) -> None:
        """The view has changed: ``(node, epoch, control address, info)`` of every peer that is not dead or gone."""
        before, self._peers = self._peers, {node: (epoch, address, info) for node, epoch, address, info in alive}
        now = self._loop.time()
        for node in list(self._retry):
            if node not in before or node not in self._peers or before[node][0] != self._peers[node][0]:
                del self._retry[node]  # another life: no reason to wait
        self.catalog.refresh(((node, peer[2]) for node, peer in self._peers.items()), now)
        for worker, link in list(self._links.items()):
            peer = self._peers.get(worker)
            if peer is None or peer[0] != link.epoch:
                self._drop(worker, "it is no longer a live member" if peer is None else "it was restarted")
        self._link_up_wanted(now)
        self._reroute(now)

    def close(self) -> None:
        self._outbox.clear()
        self._timer.cancel()
        self._cards.close()
        self.feed.close()
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
            try:
                self._links[worker] = self._open_link(worker, *peer)
            except OSError:  # out of descriptors, which has been said
                self._retry[worker] = (0, now + RETRY_S[-1])

    def _open_link(self, worker: NodeId, epoch: int, address: Address, info: PeerInfo) -> WorkerLink:
        return WorkerLink(
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
            on_kv=self.feed.received if self._follows_kv else None,
            take_kv=self.feed.take if self._follows_kv else None,
        )

    def _link_up(self, link: WorkerLink) -> None:
        log.debug("link to worker %s is up", link.worker)
        if self._died.pop(link.worker, 0) == link.epoch:
            self._carry_out(self.flights.worker_lives(link.worker, self._loop.time()))
        if self._follows_kv:
            self.feed.up(link, self._ranks(link.worker))
        self._quiet.discard(link.worker)
        self._reroute(self._loop.time())

    def _link_down(self, link: WorkerLink, reason: str) -> None:
        if link.proven:
            log.warning("worker %s is suspect: %s", link.worker, reason)
            self._suspect(link.worker)
        else:
            log.debug("worker %s cannot be reached: %s", link.worker, reason)
        died = link.broke and not link.draining
        if died:
            self._died[link.worker] = link.epoch
        self._drop(link.worker, reason, died)

    def _drop(self, worker: NodeId, reason: str, died: bool = False) -> None:
        link = self._links.pop(worker, None)
        if link is None:
            return
        self._close_link(link)
        self.links_lost += 1
        now = self._loop.time()
        tries, _ = self._retry.get(worker, (0, 0.0))
        if link.up_since and now - link.up_since > STEADY_S:
            tries = 0
        self._absence(now)
        self._listen(now)
        self._retry[worker] = (tries + 1, now + RETRY_S[min(tries, len(RETRY_S) - 1)])
        self._carry_out(self.flights.worker_lost(worker, f"worker {worker} was lost ({reason})", now, died))
        self._reroute(now)
        self.on_batch()

    def _absence(self, now: float) -> float:
        """Seconds for which this process stood still just now."""
        late = now - self._ticked - TICK_S
        if late <= ABSENT_S:
            return 0.0
        for link in list(self._links.values()):
            link.doubt()
        return late

    def _listen(self, now: float) -> None:
        """Who has fallen silent, or is heard again. Several may have at once: a partition, or we stood still; then what
        one of them is lost with must not go from one to the next."""
        quiet = {worker for worker, link in self._links.items() if link.up and not link.fresh(now)}
        if quiet != self._quiet:
            self._quiet = quiet
            self._reroute(now)

    def _close_link(self, link: WorkerLink) -> None:
        link.close()
        self.feed.lost(link.worker)
        for key in [key for key in self.loads if key[0] == link.worker]:
            del self.loads[key]

    def _links_of(self, model: str) -> list[WorkerLink]:
        """Those to the model's workers that are up and take requests."""
        known = self.catalog.models.get(model)
        links = (self._links.get(worker) for worker in (known.workers if known is not None else ()))
        return [
            link
            for link in links
            if link is not None and link.up and not link.draining and link.worker not in self._quiet
        ]

    def _ranks(self, worker: NodeId) -> int:
        return max((served.ranks for served in self._peers[worker][2].models), default=1)

    def _reroute(self, now: float) -> None:
        """Whose links have come up or gone down, or who has become ready or not."""
        serving = {}
        for name, model in self.catalog.models.items():
            targets = [
                Endpoint(link.worker, rank, served.kv_events, model.roles[link.worker], served.moves_kv)
                for link in self._links_of(name)
                for served in (model.workers[link.worker],)
                for rank in range(served.ranks)
            ]
            serving[name] = Serving(model.served.block_size, tuple(targets))
        self._carry_out(self.flights.routable(serving, now))

    # Messages.

    def _message(self, link: WorkerLink, message: Any) -> None:
        now = self._loop.time()
        if link.worker in self._quiet:
            self._listen(now)
        kind = type(message)
        if kind is Tokens:
            if message.epoch == link.epoch:
                actions = self.flights.tokens(link.worker, message.deltas, now)
                if actions:
                    self._carry_out(actions)
        elif kind is Heartbeat:
            if message.epoch == link.epoch:
                self._carry_out(self.flights.missing_at(link.worker, message.open, now - SETTLE_S, now))
        elif kind is Prefilled:
            if message.epoch == link.epoch:
                self._carry_out(self.flights.prefilled(link.worker, message, now))
        elif kind is Refused:
            refused: Refused = message
            if refused.code in ENGINE_CODES and self.flights.runs(link.worker, refused.rid, refused.attempt):
                self._engine_failed(link, refused, now)
                return
            if refused.code == "draining":
                self._drains(link, now)
            self._carry_out(
                self.flights.refused(link.worker, refused.rid, refused.attempt, refused.code, refused.reason, now)
            )

        elif kind is Move and message.epoch == link.epoch:
            self._drains(link, now)
            self._carry_out(self.flights.move(link.worker, message.requests, now))

    def _engine_failed(self, link: WorkerLink, refused: Refused, now: float) -> None:
        """It tells so of each of its requests, after their last tokens: none of them goes on there."""
        if refused.code == "engine":
            self._drop(link.worker, refused.reason, died=True)
        else:
            reason = f"worker {link.worker}: {refused.reason}"
            self._carry_out(self.flights.worker_lost(link.worker, reason, now, died=True))

    def _drains(self, link: WorkerLink, now: float) -> None:
        """Its worker says so itself, perhaps before gossip does."""
        if not link.draining:
            link.draining = True
            self._reroute(now)

    def _load(self, worker: NodeId, rank: int, load: Load) -> None:
        self.loads[worker, rank] = load
        if worker in self._quiet:
            self._listen(self._loop.time())
        actions = self.flights.report(worker, rank, load, self._loop.time())
        if actions:
            self._carry_out(actions)

    def _placed(self, key: Key, slot: int | None) -> None:
        self.flights.routes.placed(key, slot)

    def _decided(self, rid: int, decision: Decision) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("request %d: %s", rid, router_tell.line(self.router, decision))

    def _batch_done(self) -> None:
        self.on_batch()

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            link = self._links.get(action.worker)
            if link is None:
                continue
            if isinstance(action, Abandon):
                self._send()
                link.send(encode(Cancel(((action.rid, action.attempt),))))
            else:
                self._outbox.append((link, generate(action, link.epoch, self._epoch_of)))
        if self._outbox and not self._sending:
            self._sending = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        """The requests of one turn of the loop leave together: one sent by itself wakes ZeroMQ's thread and the worker,
        which would compute it before it hears of the next."""
        self._sending = False
        outbox, self._outbox = self._outbox, []
        for link, data in outbox:
            if not link.send(data):
                # Not connected any more, or its queue is full: to us the worker is lost. Not from within a caller.
                self._loop.call_soon(self._unsent, link)

    def _unsent(self, link: WorkerLink) -> None:
        if self._links.get(link.worker) is link:
            self._link_down(link, "a request could not be sent to it")

    def _epoch_of(self, node: NodeId) -> int:
        peer = self._peers.get(node)
        return 0 if peer is None else peer[0]

    def _unknown(self, model: str) -> str:
        names = ", ".join(sorted(self.catalog.models)) or "none yet"
        return f"The model {model!r} does not exist here; models: {names}."

    # Time.

    def _tick(self) -> None:
        now = self._loop.time()
        self._timer = self._loop.call_later(TICK_S, self._tick)
        absent, self._ticked = self._absence(now), now
        links = list(self._links.values())
        for link in links:
            link.tick(now, self.flights.open_at(link.worker) > 0, absent, link.patience_s(links, now))
        self._listen(now)
        self._carry_out(self.flights.tick(now))
        self.feed.tick(now)
        self.catalog.expire(now)
        for model in [m for m, used in self._wanted.items() if now - used > LINK_IDLE_S]:
            del self._wanted[model]
        wanted = self._wanted_workers()
        for worker in self._links.keys() - wanted:
            if not self.flights.open_at(worker):
                self._close_link(self._links.pop(worker))
                self._reroute(now)
        self._link_up_wanted(now)


def _logprobs(data: bytes) -> Logprobs:
    """Logprobs that cannot be read are left out; the tokens beside them are good."""
    try:
        return decode_logprobs(data)
    except WireError as error:
        log.warning("logprobs that cannot be read were left out: %s", error)
        return ()
