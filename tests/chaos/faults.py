"""Each fault, injected and healed on real hosts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from chaos import wire
from chaos.cluster import PORT, START_S, Cluster, Peer
from chaos.schedule import Fault
from chaos.verdict import Trouble
from netns.lab import Host, run

DEPARTS_S = 15.0
"""In which the second of two peers with one id is gone, or one that cannot write its data dir."""
HARMLESS = frozenset(("slow", "clock", "twin"))
"""Faults under which a peer must go on as if there were none."""


class Injector:
    """Carries faults out, one thread each if need be. ``troubles`` are those that were, ``findings`` what went on
    otherwise than it must."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.troubles: list[Trouble] = []
        self.findings: list[str] = []
        self.hurry = threading.Event()
        """Set: faults heal at once."""
        self._twins = 0
        self._kinds: dict[str, Callable[[Fault, Peer], AbstractContextManager[None]]] = {
            "kill": self._kill, "stop": self._stop, "cable": self._cable, "cut": self._cut, "reset": self._reset,
            "deaf": self._deaf, "mute": self._mute, "lossy": self._lossy, "slow": self._slow, "pair": self._pair,
            "split": self._split, "twin": self._twin, "clock": self._clock, "disk": self._disk,
        }  # fmt: skip

    def run(self, fault: Fault) -> Trouble:
        """The whole fault, healed at its end; returns when the victim is ready again."""
        peer = self.cluster.peers[fault.victim]
        with self.trouble(fault) as trouble, self._kinds[fault.kind](fault, peer):
            self.hurry.wait(fault.lasts)
        return trouble

    @contextmanager
    def on(self, fault: Fault) -> Iterator[Trouble]:
        """The fault during the block, however long it says it lasts."""
        peer = self.cluster.peers[fault.victim]
        with self.trouble(fault) as trouble, self._kinds[fault.kind](fault, peer):
            yield trouble

    @contextmanager
    def trouble(self, fault: Fault) -> Iterator[Trouble]:
        peers, links = frozenset((fault.victim,)), frozenset[frozenset[str]]()
        if fault.kind in HARMLESS:
            peers = frozenset()
        elif fault.kind in ("pair", "split"):
            near = peers if fault.kind == "pair" else frozenset(self.cluster.peers) - frozenset(fault.others)
            peers, links = frozenset(), frozenset(frozenset((a, b)) for a in near for b in fault.others)
        trouble = Trouble(str(fault).strip(), time.monotonic(), peers, links)
        self.troubles.append(trouble)
        try:
            yield trouble
        finally:
            trouble.ended = time.monotonic()

    # Processes.

    @contextmanager
    def _kill(self, fault: Fault, peer: Peer) -> Iterator[None]:
        peer.node.kill()
        yield
        self._restart(peer)

    @contextmanager
    def _stop(self, fault: Fault, peer: Peer) -> Iterator[None]:
        peer.node.signal(signal.SIGSTOP)
        yield
        peer.node.signal(signal.SIGCONT)

    def _restart(self, peer: Peer) -> None:
        before = peer.node.id if peer.node.ready else None
        node = peer.start()
        try:
            node.wait_ready(START_S)
        except AssertionError as error:
            self.findings.append(f"{peer.name} did not start again: {error}")
            return
        if before is not None and node.id != before:
            self.findings.append(f"{peer.name} came back as {node.id}, not as {before}")

    # The network.

    def _cable(self, fault: Fault, peer: Peer) -> AbstractContextManager[None]:
        return unplugged(peer.host)

    def _cut(self, fault: Fault, peer: Peer) -> AbstractContextManager[None]:
        return rules(peer.host, "INPUT -i eth0 -j DROP", "OUTPUT -o eth0 -j DROP")

    def _deaf(self, fault: Fault, peer: Peer) -> AbstractContextManager[None]:
        return rules(peer.host, "INPUT -i eth0 -j DROP")

    def _mute(self, fault: Fault, peer: Peer) -> AbstractContextManager[None]:
        return rules(peer.host, "OUTPUT -o eth0 -j DROP")

    def _reset(self, fault: Fault, peer: Peer) -> AbstractContextManager[None]:
        reject = "-p tcp -j REJECT --reject-with tcp-reset"
        return rules(peer.host, f"INPUT -i eth0 {reject}", f"OUTPUT -o eth0 {reject}")

    def _lossy(self, fault: Fault, peer: Peer) -> AbstractContextManager[None]:
        loses = f"-m statistic --mode random --probability {fault.amount} -j DROP"
        return rules(peer.host, f"INPUT -i eth0 {loses}", f"OUTPUT -o eth0 {loses}")

    def _pair(self, fault: Fault, peer: Peer) -> AbstractContextManager[None]:
        return rules(peer.host, *self._between(fault.others))

    @contextmanager
    def _split(self, fault: Fault, peer: Peer) -> Iterator[None]:
        with ExitStack() as stack:
            for name in set(self.cluster.peers) - set(fault.others):
                stack.enter_context(rules(self.cluster.peers[name].host, *self._between(fault.others)))
            yield

    def _between(self, others: tuple[str, ...]) -> list[str]:
        addresses = [self.cluster.peers[other].host.address for other in others]
        return [rule for far in addresses for rule in (f"INPUT -s {far} -j DROP", f"OUTPUT -d {far} -j DROP")]

    def _slow(self, fault: Fault, peer: Peer) -> AbstractContextManager[None]:
        return slow_cable(self.cluster.switch.space, peer.host.port, fault.amount)

    # The rest of the host.

    @contextmanager
    def _clock(self, fault: Fault, peer: Peer) -> Iterator[None]:
        assert peer.clock is not None
        peer.clock.step(fault.amount)
        yield
        peer.clock.step(0.0)

    @contextmanager
    def _disk(self, fault: Fault, peer: Peer) -> Iterator[None]:
        """Full, and the node started anew: it must say so, and have its old id once there is room."""
        with full(peer.disk):
            peer.node.kill()
            before = peer.node
            refused = peer.start()
            try:
                if refused.process.wait(DEPARTS_S) != 1 or "disk full" not in refused.stderr:
                    self.findings.append(f"{peer.name} on a full disk ended so: {refused.stderr}")
            except subprocess.TimeoutExpired:
                self.findings.append(f"{peer.name} runs on a full disk")
                refused.kill()
            yield
        peer.node = before
        self._restart(peer)

    @contextmanager
    def _twin(self, fault: Fault, peer: Peer) -> Iterator[None]:
        """A second node from a copy of the data dir. The older holder answers, so the newcomer must go."""
        spare, self._twins = self.cluster.spare, self._twins + 1
        copy = spare.folder / f"data{self._twins}"
        shutil.copytree(peer.disk, copy)
        port = ("--port", str(PORT + 10 * self._twins))
        twin = spare.node(*port, *peer.arguments, data=copy)
        yield
        try:
            if twin.process.wait(DEPARTS_S) != 1 or "--data-dir" not in twin.stderr:
                self.findings.append(f"the second {peer.name} ended so: {twin.process.returncode} {twin.stderr}")
        except subprocess.TimeoutExpired:
            self.findings.append(f"the second {peer.name} goes on: {twin.stderr}")
            twin.kill()
        if peer.node.process.poll() is not None:
            self.findings.append(f"{peer.name} gave way to a copy of itself: {peer.node.stderr}")
            self._restart(peer)


@contextmanager
def rules(host: Host, *chains: str) -> Iterator[None]:
    """With these iptables rules in front on the host, each "CHAIN MATCHES -j TARGET"."""
    for rule in chains:
        host.run("iptables", "-w", "10", "-I", *rule.split())
    yield
    for rule in chains:
        host.run("iptables", "-w", "10", "-D", *rule.split())


@contextmanager
def unplugged(host: Host) -> Iterator[None]:
    host.link("down")
    yield
    host.link("up")


@contextmanager
def slow_cable(switch: str, port: str, milliseconds: float) -> Iterator[None]:
    """With a delay each way between the switch's ``port`` and its bridge."""
    there, here = f"{port}a", f"{port}b"
    inside = ("ip", "-n", switch, "link")
    run(*inside, "add", there, "type", "veth", "peer", "name", here)
    run(*inside, "set", there, "master", "br0", "up")
    run(*inside, "set", here, "up")
    command = ["ip", "netns", "exec", switch, sys.executable, str(Path(wire.__file__)), port, here, str(milliseconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        run(*inside, "set", port, "nomaster")
        process.stdin.write("go\n")
        try:
            yield
        finally:
            process.kill()
    run(*inside, "set", port, "master", "br0")
    run(*inside, "del", there)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """With not a byte left on the disk."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        size = 65536
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    assert os.statvfs(disk).f_bavail == 0
    yield
    filler.unlink()
