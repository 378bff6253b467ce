"""N membership cores on one virtual clock and one simulated network: deterministic by seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pdyn.core.actions import Action, MemberChanged, Reply, Send
from p2pdyn.core.events import Event, Introduced, LinkDown, Received, Tick
from p2pdyn.core.membership import Member, Membership, MembershipConfig
from p2pdyn.core.membership_roster import ALIVE
from p2pdyn.core.types import Address, NodeId, Version
from p2pdyn.sim.clock import Clock
from p2pdyn.sim.network import DatagramNetwork, TcpNetwork

INFO_BYTES = 250
"""A worker's encoded PeerInfo with one model."""

FIRST_EPOCH = 1_700_000_000_000
LINKS: dict[str, type[DatagramNetwork] | type[TcpNetwork]] = {"datagram": DatagramNetwork, "tcp": TcpNetwork}


@dataclass(slots=True)
class Node:
    """One simulated process. ``reachable``: its host answers, if only with a reset; ``life`` counts boots and ends."""

    index: int
    id: NodeId
    address: Address
    core: Membership
    up: bool = True
    reachable: bool = True
    paused: bool = False
    life: int = 0
    tick_at: float | None = None
    inbox: list[Event] = field(default_factory=list)
    others: list[Action] = field(default_factory=list)
    """Alarms and Fatals so far."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes, by message kind; ``handshake``, ``heartbeat`` and ``acknowledgement`` besides."""
    sent_messages: int = 0


def node_address(index: int) -> Address:
    return Address(f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}", 7400)


class Cluster:
    """Start, crash, pause and restart nodes; partition their network; run. ``on_change`` sees each MemberChanged."""

    def __init__(
        self,
        nodes: int,
        seed: int = 0,
        links: str = "datagram",
        loss: float = 0.0,
        config: MembershipConfig | None = None,
        joined: bool = False,
        on_change: Callable[[Node, MemberChanged], None] | None = None,
    ) -> None:
        """``joined``: everybody knows everybody from the start. Else introduce them."""
        self.clock = Clock()
        self.config = config or MembershipConfig()
        self._rng = random.Random(seed)
        self._on_change = on_change
        self._by_address: dict[Address, int] = {}
        self.nodes: list[Node] = []
        self.network = LINKS[links](self, random.Random(seed + 1), loss)
        for index in range(nodes):
            self.add(index)
        if joined:
            everybody = [node.core.local for node in self.nodes]
            for node in self.nodes:
                node.core.preload(everybody)
        for node in self.nodes:
            self.clock.at(self._rng.random() * 0.5, self._event, node, node.life, Tick())

    def add(self, index: int, node_id: NodeId | None = None) -> Node:
        """A new process at a new address; with another's ``node_id`` a cloned data dir."""
        node_id = node_id or NodeId(f"{self._rng.getrandbits(64):016x}")
        address = node_address(index)
        node = Node(index, node_id, address, self._core(node_id, address))
        self._by_address[address] = len(self.nodes)
        self.nodes.append(node)
        return node

    def _core(self, node_id: NodeId, address: Address) -> Membership:
        version = Version(FIRST_EPOCH + int(self.clock.now * 1000), 0)
        info = self._rng.randbytes(INFO_BYTES)
        local = Member(node_id, version, address, ALIVE, info)
        return Membership(local, self.config, random.Random(self._rng.getrandbits(64)))

    def introduce(self, node: Node, to: Node) -> None:
        self.event(node, Introduced(to.address))

    def run(self, seconds: float) -> None:
        self.clock.run(self.clock.now + seconds)

    def crash(self, node: Node, host_too: bool = True) -> None:
        """The process ends at once; with its host, so that nothing answers at its address."""
        node.up, node.reachable = False, not host_too
        node.life += 1
        node.tick_at = None
        self.network.crashed(node.index)

    def restart(self, node: Node, seed: Node) -> None:
        """The same id in a new boot; it knows nothing but one seed."""
        node.core = self._core(node.id, node.address)
        node.up = node.reachable = True
        node.paused = False
        node.inbox.clear()
        node.life += 1
        self.event(node, Introduced(seed.address))

    def pause(self, node: Node) -> None:
        """SIGSTOP: the host takes what comes, the process does nothing."""
        node.paused = True

    def resume(self, node: Node) -> None:
        node.paused = False
        inbox, node.inbox = node.inbox, []
        for event in inbox:
            self.event(node, event)
        self.event(node, Tick())

    def event(self, node: Node, event: Event) -> None:
        self._event(node, node.life, event)

    def _event(self, node: Node, life: int, event: Event) -> None:
        if not node.up or node.life != life:
            return
        if node.paused:
            node.inbox.append(event)
            return
        for action in node.core.handle(event, self.clock.now):
            if type(action) is Send:
                to = self._by_address.get(action.to)
                if to is not None:
                    self.network.send(node.index, to, action.message)
            elif type(action) is Reply:
                self.network.reply(node.index, action.to, action.message)
            else:
                self._tell(node, action)
        self._schedule(node)

    def _tell(self, node: Node, action: Action) -> None:
        if isinstance(action, MemberChanged):
            if action.member.state != ALIVE and action.member.address in self._by_address:
                self.network.drop(node.index, self._by_address[action.member.address])  # as net.mesh does
            if self._on_change is not None:
                self._on_change(node, action)
        else:
            node.others.append(action)

    def _schedule(self, node: Node) -> None:
        at = node.core.next_deadline()
        if at is not None and (node.tick_at is None or at < node.tick_at):
            node.tick_at = at
            self.clock.at(at, self._tick, node, node.life, at)

    def _tick(self, node: Node, life: int, at: float) -> None:
        if node.tick_at != at or node.life != life or not node.up:
            return
        node.tick_at = None
        if node.paused:
            return
        due = node.core.next_deadline()
        if due is not None and due <= self.clock.now:
            self._event(node, life, Tick())
        else:
            self._schedule(node)

    def deliver(self, to: int, message: object, reply: object | None, source: int) -> None:
        """Called by the network."""
        node = self.nodes[to]
        if node.up:
            self._event(node, node.life, Received(message, reply, self.nodes[source].id))

    def link_down(self, at: int, peer: int) -> None:
        self.event(self.nodes[at], LinkDown(self.nodes[peer].address))

    def states(self, node: Node) -> dict[NodeId, str]:
        """One node's view."""
        return {member.id: member.state for member in node.core.members.values()}

    def agreed(self) -> bool:
        """Whether each running node sees exactly the running ones alive."""
        running = {node.id for node in self.nodes if node.up}
        return all(
            {id_ for id_, state in self.states(node).items() if state == ALIVE} == running
            for node in self.nodes
            if node.up
        )

    def run_until(self, condition: Callable[[], bool], limit_s: float, step_s: float = 0.1) -> float:
        """Run until the condition holds; returns the seconds it took, or raises AssertionError after ``limit_s``."""
        start = self.clock.now
        while not condition():
            if self.clock.now - start >= limit_s:
                raise AssertionError(f"not within {limit_s} s")
            self.run(step_s)
        return self.clock.now - start
