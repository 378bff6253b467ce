"""Four nodes, and a network and an operator that do whatever hypothesis thinks of."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.membership import address, member, node_id

from p2pdyn.core.actions import Fatal, Reply, Send
from p2pdyn.core.events import Announce, Event, Introduced, Leave, LinkDown, ProbeNow, Received, Tick
from p2pdyn.core.membership import Membership, MembershipConfig
from p2pdyn.core.membership_roster import ALIVE
from p2pdyn.core.types import NodeId, Version
from p2pdyn.wire.control import ALIVE_CODE, Record

NODES = range(1, 5)
AGREE_S = 35.0
"""Budget: views agree this long after the network heals."""


@dataclass(frozen=True)
class Letter:
    source: int
    to: int
    message: object
    answer: bool


class Mesh(RuleBasedStateMachine):
    """``letters`` are under way; they arrive when, as often, and in the order that a rule says."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.letters: list[Letter] = []
        self.cores: dict[int, Membership] = {}
        self.epochs = dict.fromkeys(NODES, 0)
        self.seen: dict[tuple[int, NodeId], Version] = {}
        self.rng = random.Random(0)
        self.left: set[int] = set()

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)
        for index in NODES:
            self.boot(index)

    def boot(self, index: int) -> None:
        self.epochs[index] += 1000
        local = member(index, epoch=self.epochs[index], info=f"boot {self.epochs[index]}".encode())
        self.cores[index] = Membership(local, MembershipConfig(), random.Random(self.rng.random()))
        self.seen = {key: version for key, version in self.seen.items() if key[0] != index}
        self.left.discard(index)
        self.do(index, Introduced(address(index % len(NODES) + 1)))

    def do(self, index: int, event: Event) -> None:
        core = self.cores.get(index)
        if core is None:
            return
        for action in core.handle(event, self.now):
            assert not isinstance(action, Fatal)
            if isinstance(action, Send):
                to = int(action.to.host.rpartition(".")[2])
                self.letters.append(Letter(index, to, action.message, False))
            elif isinstance(action, Reply):
                assert isinstance(action.to, int)
                self.letters.append(Letter(index, action.to, action.message, True))
        core.check()

    def arrive(self, letter: Letter) -> None:
        reply = None if letter.answer else letter.source
        self.do(letter.to, Received(letter.message, reply, node_id(letter.source)))
        core = self.cores.get(letter.to)
        if core is not None:
            for record in getattr(letter.message, "updates", ()):
                self.check_not_lost(core, record)

    def check_not_lost(self, core: Membership, record: Record) -> None:
        """A higher (epoch, incarnation) never loses."""
        if record.state == ALIVE_CODE:
            known = core.members[NodeId(record.id)]
            assert known.version >= Version(record.epoch, record.incarnation)

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.arrive(self.letters.pop(data.draw(st.integers(0, len(self.letters) - 1))))

    @precondition(lambda self: self.letters)
    @rule()
    def deliver_all(self) -> None:
        letters, self.letters = self.letters, []
        for letter in letters:
            self.arrive(letter)

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        self.arrive(data.draw(st.sampled_from(self.letters)))

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.letters.pop(data.draw(st.integers(0, len(self.letters) - 1)))

    @rule(node=st.sampled_from(NODES))
    def drop_all_to(self, node: int) -> None:
        self.letters = [letter for letter in self.letters if letter.to != node]

    @rule(seconds=st.floats(0.01, 5.0))
    def advance(self, seconds: float) -> None:
        """Timers fire on time; what they send stays under way."""
        until = self.now + seconds
        while (due := self.next_due()) is not None and due[0] <= until:
            self.now = max(self.now, due[0])
            self.do(due[1], Tick())
        self.now = until

    @rule(seconds=st.floats(1.0, 100.0))
    def pause(self, seconds: float) -> None:
        """Everybody's timers are late."""
        self.now += seconds
        for index in list(self.cores):
            self.do(index, Tick())

    @rule(node=st.sampled_from(NODES))
    def crash(self, node: int) -> None:
        self.cores.pop(node, None)

    @rule(node=st.sampled_from(NODES))
    def restart(self, node: int) -> None:
        self.boot(node)

    @rule(node=st.sampled_from(NODES), info=st.binary(max_size=8))
    def announce(self, node: int, info: bytes) -> None:
        self.do(node, Announce(info))

    @rule(node=st.sampled_from(NODES), other=st.sampled_from(NODES))
    def complain(self, node: int, other: int) -> None:
        self.do(node, ProbeNow(node_id(other)))
        self.do(node, LinkDown(address(other)))

    @rule(node=st.sampled_from(NODES))
    def leave(self, node: int) -> None:
        if node in self.cores:
            self.left.add(node)
            self.do(node, Leave())

    @invariant()
    def nobody_running_is_dead_to_itself(self) -> None:
        for index, core in self.cores.items():
            assert core.local.state == ("left" if index in self.left else ALIVE)

    @invariant()
    def versions_never_go_back(self) -> None:
        for index, core in self.cores.items():
            for node, known in core.members.items():
                before = self.seen.get((index, node))
                assert before is None or known.version >= before
                self.seen[index, node] = known.version

    def next_due(self) -> tuple[float, int] | None:
        dues = [(due, index) for index, core in self.cores.items() if (due := core.next_deadline()) is not None]
        return min(dues, default=None)

    def teardown(self) -> None:
        """The network heals: all views agree in time. Those that left stop; somebody knows each of the others."""
        for index in self.left:
            self.cores.pop(index, None)
        if not self.cores:
            return
        for index in list(self.cores):
            self.do(index, Introduced(address(min(self.cores))))
        until = self.now + AGREE_S
        while (due := self.next_due()) is not None and due[0] <= until:
            self.now = max(self.now, due[0])
            self.do(due[1], Tick())
            for _ in range(200):
                self.deliver_all()
            assert not self.letters, f"they never stop talking: {self.letters[:4]}"
        running = {node_id(index): self.cores[index].local for index in self.cores}
        for core in self.cores.values():
            alive = {node: (m.version, m.info) for node, m in core.members.items() if m.state == ALIVE}
            assert alive == {node: (m.version, m.info) for node, m in running.items()}


TestMesh = Mesh.TestCase
TestMesh.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
