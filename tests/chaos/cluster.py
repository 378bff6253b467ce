"""Six peers, each a host of its own: two frontends, four simulated workers, encryption on; and a host for clients."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from chaos.wallclock import WallClock
from netns.inside import thread_in
from netns.lab import Host, Lab, Node, Switch, run

from p2pdyn.core.types import Address
from p2pdyn.net.admin import admin_call
from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets

PORT, HTTP_PORT = 7400, 8000
CALL_S = 10.0
START_S = 40.0
AGREE_S = 35.0
"""From the last heal until all views agree (docs/design/membership.md)."""
DISK = "256k"
FRONTENDS = ("f0", "f1")
WORKERS = ("w0", "w1", "w2", "w3")
ENGINE = ("--itl-ms", "8", "--kv-blocks", "600")
"""A cache that is full after a minute of load: then memory should grow no more, and blocks are evicted all the time."""
SLOW_PREFILL = "1000"
"""Tokens a second at a worker that decodes, so that it pays to prefill elsewhere."""

T = TypeVar("T")


@dataclass
class Peer:
    """One peer's host, how it is started there, and the process that runs now. Its data dir is a small disk of its
    own."""

    name: str
    host: Host
    arguments: Sequence[str]
    disk: Path
    clock: WallClock | None
    worker: bool
    role: str = "aggregated"
    node: Node = field(init=False)

    def start(self) -> Node:
        """Without waiting for it."""
        self.node = self.host.node(*self.arguments, env=self.clock.env if self.clock else {}, data=self.disk)
        return self.node

    @property
    def url(self) -> str:
        return f"{self.host.address}:{HTTP_PORT}"


class Cluster:
    """``with Cluster(folder) as cluster``: all six are ready. ``clocks`` is the library of :mod:`chaos.wallclock`, or
    None where clocks cannot be stepped. ``apart``: two workers prefill and two decode."""

    def __init__(self, folder: Path, clocks: Path | None = None, *, apart: bool = False, transfer: str = "tcp") -> None:
        self.lab = Lab(folder)
        self.folder = folder
        self.switch: Switch
        self.client: Host
        self.spare: Host
        """For a second life of somebody's data dir."""
        self.peers: dict[str, Peer] = {}
        self._clocks, self._apart, self._transfer = clocks, apart, transfer
        self._mounts: list[Path] = []
        self._console: ThreadPoolExecutor | None = None

    def __enter__(self) -> Cluster:
        try:
            self._build()
            for peer in self.peers.values():
                peer.start()
            for peer in self.peers.values():
                peer.node.wait_ready(START_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def frontends(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if not peer.worker]

    @property
    def workers(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.worker]

    @property
    def generating(self) -> list[str]:
        """Names of the workers that can answer a request alone."""
        return [peer.name for peer in self.workers if peer.role != "prefill"]

    @property
    def urls(self) -> dict[str, str]:
        return {peer.name: peer.url for peer in self.frontends}

    def close(self) -> None:
        if self._console is not None:
            self._console.shutdown()
        self.lab.close()
        for mount in self._mounts:
            run("umount", "-l", str(mount), check=False)

    def ask(self, peer: Peer, op: str, **args: Any) -> dict[str, Any]:
        """An admin call to the peer, from the clients' host."""

        async def call() -> dict[str, Any]:
            sockets = Sockets(Security.load(self.key))
            try:
                return await admin_call(sockets, Address(peer.host.address, PORT), op, args, CALL_S)
            finally:
                sockets.close()

        return self._from_client(lambda: asyncio.run(call()))

    def metric(self, peer: Peer, name: str) -> float:
        """The sum of a frontend's metric over its labels."""

        def read() -> str:
            with urllib.request.urlopen(f"http://{peer.url}/metrics", timeout=CALL_S) as answer:
                text: str = answer.read().decode()
                return text

        rows = [line.split() for line in self._from_client(read).splitlines()]
        values = [float(row[-1]) for row in rows if row and row[0].partition("{")[0] == name]
        if not values:
            raise LookupError(f"{peer.name} has no metric {name}")
        return sum(values)

    def _from_client(self, work: Callable[[], T]) -> T:
        assert self._console is not None
        return self._console.submit(work).result(2 * CALL_S)

    def _build(self) -> None:
        self.switch = self.lab.switch("10.30.1")
        self.client = self.lab.host("client", self.switch, 100)
        self.spare = self.lab.host("spare", self.switch, 99)
        self._console = thread_in(self.client.space)
        self.key = self.folder / "cluster.key"
        self.client.p2pdyn("keygen", str(self.key))
        roles = ("prefill", "prefill", "decode", "decode") if self._apart else ("aggregated",) * 4
        hosts = {name: self.lab.host(name, self.switch, 1 + i) for i, name in enumerate((*FRONTENDS, *WORKERS))}
        common = ["--cluster-key", str(self.key), "--log-level", "info"]
        for name in FRONTENDS:
            common += ["--seed", f"{hosts[name].address}:{PORT}"]
        for name in FRONTENDS:
            self._add(hosts[name], [*common, "--engine", "none", "--http", f"0.0.0.0:{HTTP_PORT}"])
        for name, role in zip(WORKERS, roles, strict=True):
            own = ["--engine", "sim", "--no-http", "--role", role, "--kv-transfer", self._transfer]
            speed = ("--prefill-tps", SLOW_PREFILL) if role == "decode" else ()
            self._add(hosts[name], [*common, *own, "--", *ENGINE, *speed], role)

    def _add(self, host: Host, arguments: list[str], role: str = "") -> None:
        host.key = self.key
        disk = host.folder / "data"
        disk.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", str(disk))
        self._mounts.append(disk)
        clock = WallClock(self._clocks, host.folder / "clock") if self._clocks else None
        self.peers[host.name] = Peer(host.name, host, arguments, disk, clock, bool(role), role or "none")


def wait_at_rest(cluster: Cluster, since: float | None = None) -> list[str]:
    """What still keeps the cluster from rest :data:`AGREE_S` after ``since``; returns early when nothing does."""
    deadline = (time.monotonic() if since is None else since) + AGREE_S
    while left := disagreements(cluster):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.25)
    return []


def disagreements(cluster: Cluster) -> list[str]:
    """Why the cluster is not at rest; empty when all peers see the same six ready peers, frontends know every worker's
    cache block for block, and nothing is open or held."""
    try:
        reports = {peer.name: cluster.ask(peer, "peers") for peer in cluster.peers.values()}
        return _views(reports) or _held(cluster, reports) or _caches(cluster, reports)
    except (OSError, TimeoutError, RuntimeError) as error:
        return [f"a peer does not answer: {error!r}"]


def _views(reports: dict[str, dict[str, Any]]) -> list[str]:
    found: list[str] = []
    seen: dict[str, set[tuple[Any, ...]]] = {}
    for name, report in reports.items():
        states = {peer["name"]: peer["state"] for peer in report["peers"]}
        if states != dict.fromkeys(reports, "ready"):
            found.append(f"{name} sees {states}")
        for peer in report["peers"]:
            seen.setdefault(peer["name"], set()).add((peer["id"], peer["epoch"], peer["incarnation"], peer["address"]))
    return found or [f"{name} is seen as {sorted(lives)}" for name, lives in seen.items() if len(lives) > 1]


def _held(cluster: Cluster, reports: dict[str, dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for peer in cluster.workers:
        report = reports[peer.name]
        load = next(p["load"] for p in report["peers"] if p["name"] == peer.name)
        transfers = report["transfers"] or {"leases": {}, "pulls": {}, "reads": 0, "blocks_lent": 0}
        counts = {
            "active requests": load["active_requests"],
            "queued requests": load["queued"],
            "leases": sum(transfers["leases"].values()),
            "blocks lent": transfers["blocks_lent"],
            "pulls": sum(transfers["pulls"].values()),
            "reads": transfers["reads"],
        }
        found += [f"{peer.name} has {count} {what}" for what, count in counts.items() if count]
    for peer in cluster.frontends:
        if count := cluster.metric(peer, "p2pdyn_http_open_generations"):
            found.append(f"{peer.name} has {count:g} open generations")
    return found


def _caches(cluster: Cluster, reports: dict[str, dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for frontend in cluster.frontends:
        streams = {peer["name"]: peer["kv"] for peer in reports[frontend.name]["peers"]}
        for worker in cluster.workers:
            if (stream := streams[worker.name])["stream"] != "EXACT":
                found.append(f"{frontend.name} has {worker.name} as {stream}")
                continue
            own = cluster.ask(worker, "kv", worker=worker.node.id)
            if cluster.ask(frontend, "kv", worker=worker.node.id) != own:
                found.append(f"{frontend.name} believes other blocks of {worker.name} than it holds")
    return found
