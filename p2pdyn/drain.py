"""A node's way out: carries out what :mod:`p2pdyn.core.drain` decides, and answers `p2pdyn drain`, for other nodes too.

The protocol is in docs/design/drain.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Protocol

from p2pdyn.core.drain import (
    Action,
    Begin,
    Drain,
    DrainWorkers,
    End,
    Event,
    HurryWorkers,
    Leave,
    Move,
    Open,
    Refuse,
    Seen,
    Signal,
    last_of,
)
from p2pdyn.core.request import Failure
from p2pdyn.core.types import DRAINING, LOADING, STARTING, NodeId
from p2pdyn.net.admin import AdminError, admin_call

if TYPE_CHECKING:
    from p2pdyn.http.server import HttpServer
    from p2pdyn.net.dispatch import Dispatcher
    from p2pdyn.net.mesh import Mesh, Peer
    from p2pdyn.net.sockets import Sockets
    from p2pdyn.net.worker import WorkerService

log = logging.getLogger(__name__)

TICK_S = 0.1
POLL_S = 1.0
"""Longest that the operation "draining" is held until there is news."""
FORWARD_S = 3.0
"""For another node's answer, POLL_S included."""
LEAVE_S = 1.0
ENDED = Failure(503, "draining", "This endpoint was shut down before the answer was complete; ask another one.", 1)


class Crew(Protocol):
    """The workers that a supervisor runs under this node."""

    def nodes(self) -> Collection[NodeId]:
        """Those that run, as far as they are known."""

    def running(self) -> int: ...

    def drain(self) -> None: ...

    def hurry(self) -> None: ...


class Drainer:
    """One node's drain. The parts that it has are set once they are made; ``announce()`` tells the mesh."""

    def __init__(self, mesh: Mesh, sockets: Sockets, announce: Callable[[], None], crew: Crew | None = None) -> None:
        self.worker: WorkerService | None = None
        self.http: HttpServer | None = None
        self.dispatcher: Dispatcher | None = None
        self.asked = asyncio.Event()
        """By the command."""
        self._mesh = mesh
        self._sockets = sockets
        self._announce = announce
        self._crew = crew
        self._core = Drain()
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._watched = False
        mesh.on_admin("drain", self._drain)
        mesh.on_admin("draining", self._watch)

    # The node's own way.

    async def run(self, stop: asyncio.Event) -> None:
        """Until nothing is open, or there is no more time. ``stop`` is set by each signal; one that began this is not
        among them any more. Then leave."""
        self._handle(Signal() if not self.asked.is_set() else Begin())
        while self._core.state != "left":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), TICK_S)
            if stop.is_set():
                stop.clear()
                self._handle(Signal())
            self._handle(Seen(self._open()))

    async def leave(self) -> None:
        """Say so, and stay while the news spreads, to those who wait for it too."""
        self._news.set()
        alone = not any(peer.state in ("alive", "suspect") for peer in self._mesh.peers.values() if not self._own(peer))
        await self._mesh.leave(LEAVE_S)
        if alone and self._watched:
            await asyncio.sleep(POLL_S)

    def _handle(self, event: Event) -> None:
        before = self._report()
        for action in self._core.handle(event, self._loop.time()):
            self._carry_out(action)
        if not _same(before, self._report()):
            self._news.set()
            self._news = asyncio.Event()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Refuse():
                self._refuse()
            case DrainWorkers() if self._crew is not None:
                self._crew.drain()
            case HurryWorkers() if self._crew is not None:
                self._crew.hurry()
            case Move() if self.worker is not None:
                self.worker.move()
            case End():
                self._end()
            case Leave():
                left = [f"{number} {what}" for what, number in self._core.open._asdict().items() if number]
                log.info("drained, and leaving: %s", f"{', '.join(left)} had to end" if left else "nothing is open")

    def _refuse(self) -> None:
        self._announce()
        if self.worker is not None:
            self.worker.drain()
        if self.http is not None:
            self.http.drain()
        if self.dispatcher is not None:
            self.dispatcher.drain()

    def _end(self) -> None:
        if self.worker is not None:
            self.worker.end("draining", "the worker drained, and could not finish it in time")
        if self.dispatcher is not None:
            self.dispatcher.end(ENDED)

    def _open(self) -> Open:
        return Open(
            self.worker.open if self.worker is not None else 0,
            self.worker.leases if self.worker is not None else 0,
            self.http.open if self.http is not None else 0,
            self._crew.running() if self._crew is not None else 0,
        )

    def _report(self) -> dict[str, Any]:
        peer = self._mesh.peers[self._mesh.node]
        return {
            "id": peer.id,
            "name": peer.info.name,
            "epoch": peer.version.epoch,
            "state": "left" if self._core.state == "left" else DRAINING,
            **self._core.open._asdict(),
            "left_s": round(self._core.left_s(self._loop.time()), 1),
        }

    # The command.

    async def _drain(self, args: dict[str, Any]) -> dict[str, Any]:
        """Begin, here or where it is asked for."""
        node, force = args.get("node"), args.get("force", False)
        if not isinstance(node, str) or not isinstance(force, bool):
            raise ValueError("drain needs a node's id or name, and takes force, true or false")
        peer = self._find(node)
        if peer.state == "dead":
            raise AdminError(f"{_called(peer)} is dead: there is nothing to drain")
        if peer.state == "left":
            return _gone(peer)
        if not self._own(peer):
            return await self._forward(peer, "drain", {**args, "node": peer.id})
        if not self._core.begun and not self.asked.is_set():
            self._check(peer, force)
            self.asked.set()
            self._core.open = self._open()
        self._watched = True
        return self._report()

    def _check(self, own: Peer, force: bool) -> None:
        """Raises AdminError where the cluster would miss this node."""
        if own.info.state in (STARTING, LOADING):
            raise AdminError(f"{_called(own)} is still loading: drain it once it is ready, or end it with SIGTERM")
        leaving = {own.id, *(self._crew.nodes() if self._crew is not None else ())}
        models = last_of(leaving, ((p.id, p.info) for p in self._mesh.peers.values() if p.state == "alive"))
        if models and not force:
            named = ", ".join(repr(model) for model in models)
            raise AdminError(
                f"{_called(own)} is the last ready worker of model{'s' * (len(models) > 1)} {named}: start another one "
                "first, or give --force to drain it all the same"
            )

    async def _watch(self, args: dict[str, Any]) -> dict[str, Any]:
        """How far a drain is, once that is other than ``seen``, or after POLL_S."""
        node, epoch, seen = args.get("node"), args.get("epoch"), args.get("seen")
        if not isinstance(node, str) or not isinstance(epoch, int) or not isinstance(seen, dict):
            raise ValueError("draining needs a node's id, its epoch, and what has been seen")
        peer = self._find(node)
        if peer.state == "left" or peer.version.epoch > epoch:
            return _gone(peer)
        if self._own(peer):
            return await self._news_since(seen)
        if peer.state == "dead":
            raise AdminError(f"{_called(peer)} died while it drained; its streams go on elsewhere")
        try:
            return await self._forward(peer, "draining", args)
        except AdminError:
            # It may just be leaving: this peer's own view tells soon.
            await asyncio.sleep(TICK_S)
            return seen

    async def _news_since(self, seen: dict[str, Any]) -> dict[str, Any]:
        self._watched = True
        if _same(seen, self._report()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), POLL_S)
        return self._report()

    async def _forward(self, peer: Peer, op: str, args: dict[str, Any]) -> dict[str, Any]:
        if args.get("direct"):  # asked by a peer that took this one for it
            raise AdminError(f"another node answers at the address of {_called(peer)}: ask again in a moment")
        try:
            return await admin_call(self._sockets, peer.address, op, {**args, "direct": True}, FORWARD_S)
        except (ConnectionError, TimeoutError) as error:
            why = str(error) or "no answer"
            raise AdminError(f"{_called(peer)} at {peer.address} cannot be reached: {why}") from None

    def _find(self, node: str) -> Peer:
        """By id, or by a name that one peer has, of those that live if there are any."""
        peers = self._mesh.peers
        known = peers.get(NodeId(node))
        if known is not None:
            return known
        named = [peer for peer in peers.values() if peer.info.name == node]
        found = [peer for peer in named if peer.state in ("alive", "suspect")] or named
        if not found:
            raise LookupError(f"there is no node {node[:64]!r}: `p2pdyn peers` names all")
        if len(found) > 1:
            ids = ", ".join(peer.id for peer in found)
            raise LookupError(f"{len(found)} nodes are called {node!r}: name one by its id ({ids})")
        return found[0]

    def _own(self, peer: Peer) -> bool:
        return peer.id == self._mesh.node


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two reports differ in nothing but time."""
    return {**one, "left_s": 0} == {**other, "left_s": 0}


def _called(peer: Peer) -> str:
    return f"node {peer.info.name} ({peer.id})"


def _gone(peer: Peer) -> dict[str, Any]:
    return {"id": peer.id, "name": peer.info.name, "epoch": peer.version.epoch, "state": "left",
            **Open()._asdict(), "left_s": 0.0}  # fmt: skip
