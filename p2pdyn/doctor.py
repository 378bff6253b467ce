"""`p2pdyn doctor`: everything that commonly keeps a peer out of its cluster, checked, each finding with its mend.

This module plans the checks, and does those that need the cluster: seeds, skew of clocks, and whether each peer can be
reached from here and can call back.  What this host alone can tell is in :mod:`p2pdyn.doctor_host` and
:mod:`p2pdyn.doctor_model`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pdyn.constants import DEFAULT_PORT
from p2pdyn.core.types import DEAD, LEFT, Address
from p2pdyn.doctor_host import FAIL, OK, WARN, Finding, check_multicast, check_port, host_findings, judge_interfaces
from p2pdyn.net import interfaces
from p2pdyn.net.reach import connect

if TYPE_CHECKING:
    from p2pdyn.net.curve import Security
    from p2pdyn.net.sockets import Sockets

ASK_S = 5.0
MAX_SKEW_S = 2.0
"""Between two peers. Nothing breaks above it, but logs and boot epochs of hosts no longer compare."""
AT_ONCE = 16
LOCAL = Address("127.0.0.1", DEFAULT_PORT)
PORTS = ("control", "requests", "events", "KV transfer")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to check: the settings that a node here would have. ``at`` is a running peer, ``at_given`` named by hand."""

    listen: str | None = None
    port: int = DEFAULT_PORT
    http: Address | None = None
    cluster_key: Path | None = None
    mdns: bool = True
    seeds: tuple[str, ...] = ()
    seeds_file: Path | None = None
    at: Address = LOCAL
    at_given: bool = False
    builtin_models: tuple[str | None, ...] = ()
    """``--model`` of each worker that runs the builtin engine; None: its own."""
    offline: bool = False


async def examine(plan: Plan) -> list[Finding]:
    """All findings, in reading order. Every check is bounded; one that breaks becomes a finding itself."""
    found = interfaces.ranked()
    findings: list[Finding] = []
    try:
        listen = interfaces.pick(plan.listen, found)
    except ValueError as error:
        findings += judge_interfaces(found, [])
        findings.append(Finding("interfaces", FAIL, str(error), "see the interfaces above"))
        listen = interfaces.Listen(("127.0.0.1",), (), "nothing else is usable")
    else:
        findings += judge_interfaces(found, [i.name for i in listen.interfaces])
    if plan.mdns:
        findings += await asyncio.gather(*(check_multicast(i) for i in listen.interfaces))
    findings += check_ports(listen.host, plan)
    key_finding, security = check_key(plan)
    findings.append(key_finding)
    findings += await asyncio.to_thread(host_findings)
    findings += await asyncio.to_thread(check_models, plan)
    findings += await check_seeds(plan)
    findings += await check_cluster(plan, security, listen.hosts)
    return findings


def check_models(plan: Plan) -> list[Finding]:
    from p2pdyn.doctor_model import check_model
    from p2pdyn.engines.builtin.weights import cache_folder

    return [check_model(model, plan.offline, cache_folder()) for model in dict.fromkeys(plan.builtin_models)]


def check_ports(host: str, plan: Plan) -> list[Finding]:
    findings = []
    if plan.port:
        findings = [check_port(host, plan.port + i, what, "--port BASE") for i, what in enumerate(PORTS)]
    if plan.http is not None and plan.http.port:
        findings.append(check_port(plan.http.host, plan.http.port, "HTTP", "--http HOST:PORT"))
    return findings


def check_key(plan: Plan) -> tuple[Finding, Security]:
    """Judge the key file, and what to speak to the cluster with."""
    from p2pdyn.net.curve import Security

    none = Security.insecure(allow_remote=True)
    if plan.cluster_key is None:
        mend = "make one with `p2pdyn keygen FILE`, copy it to every host and give --cluster-key FILE"
        return Finding(
            "key", WARN, "no cluster key: a node listens on loopback only, unless --insecure is given", mend
        ), none
    try:
        security = Security.load(plan.cluster_key)
    except (ValueError, OSError) as error:
        return Finding("key", FAIL, str(error), "give a readable key file made by `p2pdyn keygen FILE`"), none
    prints = security.fingerprint.split(",")
    pairs = "one key" if len(prints) == 1 else "two keys, a rotation under way"
    return Finding("key", OK, f"{plan.cluster_key}: {pairs}, fingerprint {', '.join(prints)}"), security


async def check_seeds(plan: Plan) -> list[Finding]:
    """Does each seed resolve, and does something listen there?"""
    from p2pdyn.net.seeds import Seeds, resolve

    try:
        seeds = Seeds(plan.seeds, plan.seeds_file, lambda _: None).seeds
    except ValueError as error:
        return [Finding("seeds", FAIL, str(error), "correct it")]

    async def check(seed: Address) -> Finding:
        try:
            addresses = await resolve(seed)
        except (OSError, TimeoutError, UnicodeError) as error:
            return Finding(
                "seeds", FAIL, f"seed {seed} does not resolve ({error})", "correct the name, or use an address"
            )
        outcomes = [await connect(address) for address in addresses]
        if not all(outcomes):
            return Finding("seeds", OK, f"seed {seed} listens")
        mend = "start the peer there, or open its control port in the firewall"
        return Finding("seeds", WARN, f"seed {seed}: {outcomes[0]}", mend)

    return list(await _gather(check(seed) for seed in seeds))


# ---- the cluster ----


async def check_cluster(plan: Plan, security: Security, own_hosts: Sequence[str]) -> list[Finding]:
    """Ask the peer at ``plan.at`` for its cluster; then clocks, and every peer both ways."""
    from p2pdyn.net.sockets import Sockets

    if why := await connect(plan.at):
        mend = "start a node and run doctor again, or name a running peer with --at HOST:PORT"
        return [Finding("cluster", FAIL if plan.at_given else OK, f"no peer at {plan.at}: {why}", mend)]
    sockets = Sockets(security)
    try:
        return await _ask_cluster(sockets, plan, own_hosts)
    finally:
        sockets.close()


async def _ask_cluster(sockets: Sockets, plan: Plan, own_hosts: Sequence[str]) -> list[Finding]:
    from p2pdyn.net.admin import admin_call

    try:
        report = await admin_call(sockets, plan.at, "peers", {}, ASK_S)
    except (TimeoutError, ConnectionError, RuntimeError) as error:
        why = f" ({error})" if str(error) else ""
        mend = "give the cluster's key with --cluster-key FILE" + (
            ", or another port with --at" if plan.at_given else ""
        )
        return [Finding("cluster", FAIL, f"something listens at {plan.at} but gives no answer{why}", mend)]
    peers = [p for p in report["peers"] if p["state"] not in (DEAD, LEFT)]
    findings = [Finding("cluster", OK, f"cluster {report['cluster']} at {plan.at}: {len(peers)} peers")]
    findings += judge_skew(peers)
    own = next((p["address"] for p in peers if Address.parse(p["address"]).host in own_hosts), None)
    others = [Address.parse(p["address"]) for p in peers if p["address"] != own]
    async with _callback(own, own_hosts[0], plan.port) as callback:
        findings += await _gather(_both_ways(sockets, peer, callback) for peer in others)
    return findings


def judge_skew(peers: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """``clock_s`` of a peer is how far its clock is ahead of the asked peer's, in seconds."""
    skews = {p["name"]: float(p["clock_s"]) for p in peers if p.get("clock_s") is not None}
    off = [f"{name} {skew:+.1f} s" for name, skew in skews.items() if abs(skew) > MAX_SKEW_S]
    if off:
        return [Finding("clock", WARN, f"clocks differ: {', '.join(off)}", "enable NTP on those hosts")]
    widest = max((abs(skew) for skew in skews.values()), default=0.0)
    return [Finding("clock", OK, f"the peers' clocks agree within {widest:.2f} s")]


@contextlib.asynccontextmanager
async def _callback(own: str | None, host: str, port: int) -> AsyncIterator[Address]:
    """Where peers are to call back: this host's peer when it runs, else a listener on the port it would have.

    The port matters: a firewall that lets 7400 through drops an arbitrary one.
    """
    if own is not None:
        yield Address.parse(own)
        return
    server = None
    for candidate in (port, 0):
        with contextlib.suppress(OSError):
            server = await asyncio.start_server(lambda _, writer: writer.close(), host, candidate)
            break
    if server is None:
        yield Address(host, port)
        return
    async with server:
        yield Address(host, int(server.sockets[0].getsockname()[1]))


async def _both_ways(sockets: Sockets, peer: Address, callback: Address) -> Finding:
    from p2pdyn.net.admin import admin_call

    if why := await connect(peer):
        mend = f"open port {peer.port} on {peer.host} for this host"
        return Finding("reach", FAIL, f"{peer} cannot be reached from here: {why}", mend)
    try:
        answer = await admin_call(sockets, peer, "reach", {"address": str(callback)}, ASK_S)
    except (TimeoutError, ConnectionError, RuntimeError) as error:
        mend = "see that peer's log; it may have another cluster key"
        return Finding("reach", WARN, f"{peer} accepts connections but does not answer ({error})", mend)
    if not answer.get("ok"):
        mend = f"open port {callback.port} on this host for {peer.host}, or listen on an address that it can route to"
        return Finding("reach", FAIL, f"{peer} cannot call back to {callback}: {answer.get('error')}", mend)
    return Finding("reach", OK, f"{peer} and this host reach each other")


async def _gather(checks: Any) -> list[Finding]:
    """Run checks side by side, AT_ONCE at a time, and keep their order."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def bounded(check: Any) -> Finding:
        async with gate:
            finding: Finding = await check
            return finding

    return list(await asyncio.gather(*(bounded(check) for check in checks)))
