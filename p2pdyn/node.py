"""One peer: builds the cores, starts the shells, owns the order of shutdown.

Start-up binds everything before anything is announced; the engine loads last, while the peer already gossips its
progress.  Shutdown goes the other way: say so, finish what runs, leave, close.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import resource
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from p2pdyn import __version__, ports, serving
from p2pdyn.config import Config, ConfigError, ReadyInfo, StartError
from p2pdyn.core.types import (
    AGGREGATED,
    DRAINING,
    LOADING,
    READY,
    STALLED,
    STARTING,
    Address,
    Load,
    NodeId,
    PeerInfo,
)
from p2pdyn.datadir import DataDir
from p2pdyn.drain import LEAVE_S, Crew, Drainer
from p2pdyn.engines.base import EngineError, EngineInfo, EngineUsageError, Step
from p2pdyn.engines.runner import Runner, make_runner
from p2pdyn.net import interfaces
from p2pdyn.net.curve import Security
from p2pdyn.net.mesh import Mesh, Peer
from p2pdyn.net.reach import reach
from p2pdyn.net.seeds import Seeds
from p2pdyn.net.sockets import Sockets
from p2pdyn.net.worker import WorkerService
from p2pdyn.reload import Part, reload_when, take_cluster_key
from p2pdyn.report import cluster_report, mesh_metrics
from p2pdyn.text.card import digest_of

if TYPE_CHECKING:
    from p2pdyn.net.mdns import Mdns
    from p2pdyn.net.transfers import Owner, Transfers

log = logging.getLogger(__name__)

Ready = Callable[[ReadyInfo], Awaitable[None] | None]
Seen = Callable[[NodeId, str], None]

PROGRESS_S = 0.5
"""Shortest time between two gossiped loading percentages."""
MAX_DESCRIPTORS = 65_536


async def run(
    config: Config,
    *,
    ready: Ready,
    stop: asyncio.Event,
    reload: asyncio.Event | None = None,
    seen: Seen | None = None,
    crew: Crew | None = None,
) -> int:
    """Run one peer until ``stop`` is set (again: at once), or it is drained; the exit code. Each time ``reload`` is
    set, the cluster key, and the endpoint's API keys and certificate, are read again. ``seen`` hears of each peer's
    state as this one sees it, once this one's frontend knows it too. ``crew`` is drained with this one.

    Raises ConfigError and StartError with one sentence each.
    """
    _raise_descriptor_limit()
    with DataDir(config.data_dir) as data:
        node = Node(config, data, seen, crew)
        try:
            await node.start(ready, reload)
            return await node.serve(stop)
        finally:
            await node.close()


class Node:
    """The composition root. Nothing else knows all parts."""

    def __init__(self, config: Config, data: DataDir, seen: Seen | None = None, crew: Crew | None = None) -> None:
        self.config = config
        self.seen = seen
        self.crew = crew
        self.data = data
        self.epoch = data.epoch
        self.rng = random.Random()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stack = contextlib.AsyncExitStack()
        self.info = PeerInfo(config.name, __version__, config.role, config.engine, state=STARTING)
        self.worker: WorkerService | None = None
        self.runner: Runner | None = None
        self.dispatcher: Any = None
        self.http: Any = None
        self.mdns: Mdns | None = None
        self.tasks: list[asyncio.Task[Any]] = []
        self.mesh: Mesh
        self.drainer: Drainer
        self.told_progress = 0.0

    # Start.

    async def start(self, ready: Ready, reload: asyncio.Event | None = None) -> None:
        config = self.config
        try:
            listen = interfaces.pick(config.listen)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        security = self._security()
        _import_parts(config)
        sockets = self.sockets = Sockets(security)
        self.stack.callback(sockets.close)
        try:
            self._bind(sockets, listen)
        except OSError as error:  # its text is the sentence
            raise StartError(error.strerror or str(error)) from None
        self.mesh.on_admin("peers", lambda args: self.report())
        self.mesh.on_admin("reach", reach)
        self.mesh.on_admin("explain", self._explain)
        self.mesh.on_admin("kv", self._kv)
        if config.http is not None:
            await self._start_http(sockets)
        if reload is not None:
            self._background(reload_when(reload, self._reloads))
        self.mesh.start()
        await self._introduce(security, listen)
        log.info("node %s listens on %s (%s)", self.data.node, self.mesh.address, listen.why)
        log.info("ports: %s", ports.listing(config, self.mesh.address.port, self.info, os.environ))
        if config.engine != "none":
            await self._load_engine()
        else:
            self._tell(state=READY)
        outcome = ready(self._ready_info())
        if outcome is not None:
            await outcome
        self._background(self._watch())

    def _bind(self, sockets: Sockets, listen: interfaces.Listen) -> None:
        config = self.config
        if config.engine != "none":
            self._bind_worker(sockets, listen.host)
        self.mesh = Mesh(
            sockets,
            node=self.data.node,
            epoch=self.data.epoch,
            cluster=config.cluster,
            info=self.info,
            listen=[Address(host, config.port) for host in listen.hosts],
            advertise_host=listen.host,
            on_change=self._changed,
            on_fatal=self._fatal,
            rng=self.rng,
        )
        self.stack.callback(self.mesh.close)
        self.drainer = Drainer(self.mesh, sockets, lambda: self._tell(state=DRAINING, detail=""), self.crew)
        self.drainer.worker = self.worker

    def _security(self) -> Security:
        try:
            if self.config.cluster_key is not None:
                return Security.load(self.config.cluster_key)
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from None
        return Security.insecure(allow_remote=self.config.insecure)

    def _bind_worker(self, sockets: Sockets, host: str) -> None:
        base = self.config.port
        requests, events = (Address(host, base and base + offset) for offset in (1, 2))
        self.worker = WorkerService(sockets, self.data.node, self.data.epoch, [requests], [events], self._owner_epoch)
        self.stack.callback(self.worker.close)
        self.info = replace(
            self.info, requests_port=self.worker.requests_port, events_port=self.worker.events_port, state=LOADING
        )

    async def _start_http(self, sockets: Sockets) -> None:
        from p2pdyn.http.server import HttpServer, HttpSettings
        from p2pdyn.net.dispatch import Dispatcher

        config = self.config
        assert config.http is not None
        self.dispatcher = Dispatcher(
            sockets,
            self.data.node,
            self.data.epoch,
            config.router,
            self.rng,
            eager=config.http_given,
            suspect=lambda node: self.mesh.probe(node),
            report=self.report,
            mesh_metrics=lambda: mesh_metrics(self.mesh, self.worker),
        )
        self.stack.callback(self.dispatcher.close)
        settings = HttpSettings(
            config.http, api_key_file=config.api_key_file, tls_cert=config.tls_cert, tls_key=config.tls_key
        )
        try:
            server = HttpServer(self.dispatcher, settings)
        except (OSError, ValueError) as error:  # a key file or a certificate
            raise ConfigError(str(error)) from None
        try:
            url = await server.start()
        except OSError as error:
            raise StartError(
                f"the HTTP endpoint cannot listen on {config.http} ({error.strerror}): "
                "give a free port with --http HOST:PORT, or --no-http"
            ) from None
        self.stack.push_async_callback(server.stop, 1.0)
        self.http = self.drainer.http = server
        self.drainer.dispatcher = self.dispatcher
        self.info = replace(self.info, http=url)

    async def _introduce(self, security: Security, listen: interfaces.Listen) -> None:
        config, mesh = self.config, self.mesh
        if config.seeds or config.seeds_file:
            try:
                seeds = Seeds(config.seeds, config.seeds_file, lambda address: mesh.introduce(address, "seed"))
            except ValueError as error:
                raise StartError(str(error)) from None
            self._background(seeds.run())
        if config.mdns:
            from p2pdyn.net.mdns import Mdns

            complaints = self.sockets.complaints
            mdns = self.mdns = Mdns(
                node=self.data.node,
                cluster=config.cluster,
                name=config.name,
                port=mesh.address.port,
                addresses=[host for host in listen.hosts if not Address(host, 0).is_loopback] or listen.hosts,
                key_fingerprint=security.fingerprint,
                interfaces=listen.interfaces,
                on_peer=lambda address, properties: mesh.introduce(address, "mdns"),
                on_refused=lambda address, why: complaints.add("refused-key", address.host, why),
            )
            await mdns.start()
            self.stack.push_async_callback(mdns.close)

    async def _load_engine(self) -> None:
        config = self.config
        assert self.worker is not None
        options = serving.engine_options(config, self.data, self.epoch, self.mesh.address.host)
        try:
            runner = self.runner = make_runner(config.engine, options, self._stepped, self._engine_died)
            self.stack.push_async_callback(runner.close)
            info = await self._until_ended(runner.start(self._progress))
        except EngineUsageError as error:
            raise ConfigError(str(error)) from None
        except EngineError as error:
            raise StartError(str(error)) from None
        digest = await asyncio.to_thread(digest_of, info.card)
        self.worker.serve(runner, info, [info.model], digest)
        transfers = self._transfers(runner, info)
        if transfers is not None:
            self.worker.transfers = transfers
            if config.role != AGGREGATED:
                transfers.start()
            self.stack.push_async_callback(transfers.close)
        models = (serving.served_model(info, digest, config.kv_transfer if transfers is not None else "off"),)
        self._tell(state=READY, progress=1.0, detail="", engine=info.engine, engine_version=info.version, models=models)
        if transfers is not None:
            for peer in list(self.mesh.peers.values()):
                transfers.meet(peer.id)

    def _transfers(self, runner: Runner, info: EngineInfo) -> Transfers | None:
        """For an engine whose KV memory we can reach."""
        if runner.memory is None or self.config.kv_transfer == "off":
            return None
        from p2pdyn.net.transfers import Transfers

        assert self.worker is not None
        mover = serving.mover(self.config, self.sockets, self.data.node, self.epoch, self.mesh.address.host)
        return Transfers(
            self.sockets, self.data.node, self.epoch, runner, info, self.worker.answer, self._owner, mover
        )  # fmt: skip

    def _owner(self, node: NodeId) -> Owner | None:
        """A live worker, as membership has it."""
        peer = self.mesh.peers.get(node)
        return None if peer is None else serving.owner(peer, self.info)

    def _owner_epoch(self, node: NodeId) -> int:
        owner = self._owner(node)
        return 0 if owner is None else owner.epoch

    async def _until_ended(self, loading: Awaitable[EngineInfo]) -> EngineInfo:
        """Loading has no deadline, but ends with the node."""
        task = asyncio.ensure_future(loading)
        await _first(task, self.ended)
        if not task.done():
            task.cancel()
            raise StartError(self.ended.result())
        return task.result()

    def _ready_info(self) -> ReadyInfo:
        models = self.info.models
        return ReadyInfo(
            self.data.node,
            str(self.mesh.address),
            self.info.http or None,
            models[0].name if models else None,
            self.info.role,
        )

    def _reloads(self) -> list[Part]:
        """What is read again at SIGHUP."""
        parts: list[Part] = []
        key, http = self.config.cluster_key, self.http
        if key is not None:
            parts.append(("cluster key", lambda: take_cluster_key(key, self.sockets, self.mdns)))
        if http is not None:
            parts.append(("API keys and TLS certificate", http.reload))
        return parts

    # Serve and stop.

    async def serve(self, stop: asyncio.Event) -> int:
        """Until asked to stop or to drain, or unable to go on."""
        asked = [asyncio.ensure_future(event.wait()) for event in (stop, self.drainer.asked)]
        await _first(*asked, self.ended)
        for one in asked:
            one.cancel()
        if self.ended.done():
            await self.mesh.leave(LEAVE_S)
            raise StartError(self.ended.result())
        if not self.drainer.asked.is_set():
            stop.clear()
        await self.drainer.run(stop)
        await self.drainer.leave()
        return 0

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.stack.aclose()
        if not self.ended.done():
            self.ended.cancel()

    # What the parts tell each other.

    async def _explain(self, args: dict[str, Any]) -> dict[str, Any]:
        if self.http is None:
            raise ValueError("this peer has no HTTP endpoint and routes nothing: ask one that has")
        explained: dict[str, Any] = await self.http.explain(args)
        return explained

    def _kv(self, args: dict[str, Any]) -> dict[str, Any]:
        """The blocks of one rank of one worker, as that worker has them or as this frontend believes."""
        worker, rank = args.get("worker"), args.get("rank", 0)
        if not isinstance(worker, str) or not isinstance(rank, int):
            raise ValueError("kv needs a worker's id, and takes a rank")
        if self.worker is not None and self.worker.kv is not None and worker == self.data.node:
            return self.worker.kv.dump(rank)
        if self.dispatcher is None:
            raise LookupError("this peer has no HTTP endpoint and follows nobody's KV cache")
        held: dict[str, Any] = self.dispatcher.feed.dump(worker, rank)
        return held

    def report(self) -> dict[str, Any]:
        """What `p2pdyn peers --json` prints."""
        loads: dict[NodeId, Load] = {}
        streams: dict[NodeId, dict[str, Any]] = {}
        incompatible: dict[NodeId, str] = {}
        if self.dispatcher is not None:
            loads, streams = self.dispatcher.loads_report(), self.dispatcher.streams_report()
            incompatible = self.dispatcher.catalog.incompatible
        if self.worker is not None:
            loads[self.data.node] = self.worker.load
            if self.worker.kv is not None:
                streams[self.data.node] = self.worker.kv.report()
        transfers = None if self.worker is None or self.worker.transfers is None else self.worker.transfers.report()
        return cluster_report(self.config.cluster, self.mesh, loads, streams, incompatible, transfers)

    def _changed(self, peer: Peer, was: str | None) -> None:
        if peer.id == self.data.node:
            self._own_epoch(peer.version.epoch)
        if was != peer.state:
            log.info("peer %s (%s) at %s: %s -> %s", peer.info.name, peer.id, peer.address, was or "new", peer.state)
        if self.dispatcher is not None:
            self.dispatcher.refresh(
                (p.id, p.version.epoch, p.address, p.info)
                for p in self.mesh.peers.values()
                if p.state in ("alive", "suspect")
            )
        if self.worker is not None and self.worker.transfers is not None:
            self.worker.transfers.meet(peer.id)
        if self.seen is not None:
            self.seen(peer.id, peer.info.state if peer.state == "alive" else peer.state)

    def _own_epoch(self, epoch: int) -> None:
        """Membership raises it where the cluster remembers a later life of this id: a copied or restored data dir on a
        host whose clock is behind."""
        if epoch != self.epoch:
            log.warning("the cluster knew a later life of this node: its epoch rises from %d to %d", self.epoch, epoch)
            self.epoch = epoch
            self.data.raise_epoch(epoch)
            if self.worker is not None:
                self.worker.set_epoch(epoch)

    def _fatal(self, text: str) -> None:
        if not self.ended.done():
            self.ended.set_result(text)

    def _stepped(self, step: Step) -> None:
        if self.worker is not None:
            self.worker.on_step(step)

    def _engine_died(self, reason: str) -> None:
        if self.worker is not None:
            self.worker.engine_died(reason)
        self._fatal(f"engine {self.config.engine} ended ({reason}): see its output above, and start the node again")

    def _progress(self, fraction: float, detail: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self.told_progress >= PROGRESS_S:
            self.told_progress = now
            self._tell(state=LOADING, progress=round(fraction, 3), detail=detail[:200])

    def _tell(self, **changes: Any) -> None:
        """Change what this peer says of itself; everybody hears at once."""
        info = replace(self.info, **changes)
        if info != self.info:
            self.info = info
            self.mesh.update(info)

    def _background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._background_done)
        self.tasks.append(task)

    def _background_done(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", exc_info=error)
            self._fatal(f"an internal task failed ({error!r}): please report it")

    async def _watch(self) -> None:
        """An engine that stands still with work queued is told as stalled, and as ready once it moves again."""
        while self.worker is not None and self.runner is not None:
            await asyncio.sleep(1.0)
            now = asyncio.get_running_loop().time()
            quiet_s = now - self.runner.last_step_s
            still = self.runner.has_work and quiet_s > self.worker.patience_s
            if still and self.info.state == READY:
                reason = f"no engine step for {quiet_s:.0f} s with requests open"
                self._tell(state=STALLED, detail=reason)
                self.worker.stall(reason)
            elif not still and self.info.state == STALLED:
                self.worker.resume()
                self._tell(state=READY, detail="")


def _import_parts(config: Config) -> None:
    """What this peer needs and not every one pays for. Before the mesh is there, whose loop the imports would hold up
    for up to 0.3 s."""
    if config.http is not None:
        import p2pdyn.http.server
        import p2pdyn.net.dispatch
    if config.engine != "none" and config.kv_transfer != "off":
        import p2pdyn.net.transfers
        import p2pdyn.transfer.choose
    if config.mdns:
        import p2pdyn.net.mdns  # noqa: F401


def _raise_descriptor_limit() -> None:
    """The soft limit is 1024 on most systems, which a frontend of some 90 workers passes (docs/design/wire.md)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
