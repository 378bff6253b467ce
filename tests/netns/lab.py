"""Several hosts on one machine: network namespaces joined by bridges and routers, with no way out and no DNS.

Everything lives in namespaces of the lab's own, the bridges too, so nothing of the machine's network is touched and two
runs never meet.  Each step is bounded; :meth:`Lab.close` kills every process in every namespace and removes them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netns.inside import thread_in
from support.nodes import NodeProcess, ask_peers

STEP_S = 40.0
"""A machine under full load starts a process slowly."""


TOOLS = {"ip": "iproute2", "ss": "iproute2", "iptables": "iptables", "sysctl": "procps"}
"""What the lab and its tests run, and the Debian package of each."""


def missing() -> str:
    """Why the lab cannot be built here; empty when it can. Tries each kind of thing that the lab makes once."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"needs {tool} (apt-get install {package})"
    probe = f"p2pdyn-probe-{secrets.token_hex(3)}"
    inside = ("ip", "netns", "exec", probe)
    try:
        run("ip", "netns", "add", probe)
        run(*inside, "ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        run(*inside, "ip", "link", "add", "port", "type", "veth", "peer", "name", "there")
        run(*inside, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        run(*inside, "iptables", "-A", "INPUT", "-s", "192.0.2.1", "-j", "DROP")
        run(*inside, "ss", "-lun")
        (Path("/etc/netns") / probe).mkdir(parents=True)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return f"cannot make network namespaces here: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=STEP_S, check=False)
        shutil.rmtree(Path("/etc/netns") / probe, ignore_errors=True)
    return ""


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_S)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Switch:
    """One Ethernet segment: a bridge without multicast snooping. ``prefix`` is the first three octets of its /24."""

    space: str
    prefix: str
    ports: int = 0


class Node(NodeProcess):
    """One `p2pdyn node` process on a host. What a real host has of its own (host name, home) comes by environment."""

    def __init__(self, host: Host, arguments: Sequence[str], env: Mapping[str, str], data: Path | None) -> None:
        own = {"P2PDYN_NAME": host.name, "P2PDYN_DATA_DIR": str(data or host.folder / "data"), "HOME": str(host.folder)}
        self.host = host
        super().__init__(["node", *arguments], prefix=host.prefix, env={**own, **env})

    def report(self) -> dict[str, Any]:
        """The cluster as this node sees it, asked from its own host."""
        with thread_in(self.host.space) as there:
            return there.submit(ask_peers, self.mesh, self.host.key).result()

    def states(self) -> dict[str, str]:
        """name -> state of every peer but itself, as this node sees them."""
        report = self.report()
        return {p["name"]: p["state"] for p in report["peers"] if p["id"] != report["self"]}

    def sees(self, *names: str) -> bool:
        """Exactly these are ready in this node's view."""
        return {name for name, state in self.states().items() if state == "ready"} == set(names)


@dataclass
class Host:
    """One host: a namespace with lo and one Ethernet port, eth0."""

    lab: Lab
    name: str
    space: str
    address: str
    folder: Path
    key: Path | None = None
    port: str = ""
    """The switch's end of its cable."""

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.space)

    def run(self, *command: str, check: bool = True) -> str:
        return run(*self.prefix, *command, check=check)

    def p2pdyn(self, *arguments: str) -> str:
        """Run the p2pdyn command on this host to its end and return its stdout."""
        return self.run(sys.executable, "-m", "p2pdyn", *arguments)

    def spawn(self, *command: str) -> subprocess.Popen[str]:
        """Any program on this host, with its stdout on a pipe."""
        process = subprocess.Popen(
            [*self.prefix, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        self.lab.processes.append(process)
        return process

    def node(self, *arguments: str, env: Mapping[str, str] | None = None, data: Path | None = None) -> Node:
        """Start `p2pdyn node`, without waiting for it."""
        node = Node(self, arguments, env or {}, data)
        self.lab.nodes.append(node)
        return node

    def link(self, state: str) -> None:
        """Pull the cable ("down") or put it back ("up"). Routes through eth0 come back with it."""
        self.run("ip", "link", "set", "eth0", state)
        if state == "up":
            for route in self.lab.routes.get(self.space, ()):
                self.run("ip", "route", "replace", *route)

    def drop(self, *addresses: str) -> None:
        """Lose every packet from and to these addresses, silently, as a broken switch does."""
        for address in addresses:
            self.run("iptables", "-I", "INPUT", "-s", address, "-j", "DROP")
            self.run("iptables", "-I", "OUTPUT", "-d", address, "-j", "DROP")

    def heal(self) -> None:
        self.run("iptables", "-F")


class Lab:
    """``with Lab(tmp_path) as lab``: build segments, hosts and routers, start nodes, take all of it down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = f"p2p{secrets.token_hex(3)}"
        self.spaces: list[str] = []
        self.nodes: list[Node] = []
        self.processes: list[subprocess.Popen[str]] = []
        self.routes: dict[str, list[Sequence[str]]] = {}

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for node in self.nodes:  # pytest shows it where the test failed
            print(f"--- stderr of {node.host.name}\n{node.stderr}", file=sys.stderr)

    def switch(self, prefix: str) -> Switch:
        """A segment for ``prefix``.0/24, such as "10.20.1"."""
        switch = Switch(self._space(f"sw{len(self.spaces)}"), prefix)
        inside = ("ip", "-n", switch.space)
        run(
            *inside,
            "link",
            "add",
            "br0",
            "type",
            "bridge",
            "mcast_snooping",
            "0",
            "stp_state",
            "0",
            "forward_delay",
            "0",
        )
        run(*inside, "link", "set", "br0", "up")
        return switch

    def host(self, name: str, switch: Switch, number: int) -> Host:
        """A host with address ``prefix.number`` and nothing but its own segment in its routing table."""
        space = self._space(name)
        folder = self.folder / name
        folder.mkdir()
        port = self._plug(space, "eth0", switch, number)
        return Host(self, name, space, f"{switch.prefix}.{number}", folder, port=port)

    def router(self, *switches: Switch, number: int = 254) -> Host:
        """A host that forwards between the segments, at ``prefix.number`` in each."""
        space = self._space("router")
        run("ip", "netns", "exec", space, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for port, switch in enumerate(switches):
            self._plug(space, f"eth{port}", switch, number)
        folder = self.folder / "router"
        folder.mkdir()
        return Host(self, "router", space, f"{switches[0].prefix}.{number}", folder)

    def route(self, host: Host, to: Switch, via: str) -> None:
        """The way to one other segment; never a default route."""
        route = (f"{to.prefix}.0/24", "via", via)
        self.routes.setdefault(host.space, []).append(route)
        host.run("ip", "route", "add", *route)

    def close(self) -> None:
        for space in self.spaces:
            for pid in run("ip", "netns", "pids", space, check=False).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for node in self.nodes:
            node.stop()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STEP_S)
            if process.stdout is not None:
                process.stdout.close()
        for space in self.spaces:
            run("ip", "netns", "del", space, check=False)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
        self.spaces.clear()

    def _space(self, name: str) -> str:
        space = f"{self.tag}-{name}"
        run("ip", "netns", "add", space)
        self.spaces.append(space)
        resolver = Path("/etc/netns") / space / "resolv.conf"  # `ip netns exec` mounts it over the host's own
        resolver.parent.mkdir(parents=True, exist_ok=True)
        resolver.write_text("# no DNS here\n")
        run("ip", "-n", space, "link", "set", "lo", "up")
        return space

    def _plug(self, space: str, port: str, switch: Switch, number: int) -> str:
        """The name of the switch's port."""
        switch.ports += 1
        there = f"port{switch.ports}"
        run("ip", "link", "add", port, "netns", space, "type", "veth", "peer", "name", there, "netns", switch.space)
        run("ip", "-n", switch.space, "link", "set", there, "master", "br0", "up")
        run("ip", "-n", space, "addr", "add", f"{switch.prefix}.{number}/24", "dev", port)
        run("ip", "-n", space, "link", "set", port, "up")
        return there
