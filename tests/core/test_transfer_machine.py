"""Lenders and borrowers whose processes, engines, movers and links do what they like: nobody ever uses another prompt's
KV, and in the end every block is free."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.transfer_engine import BLOCK_BYTES, DEPTH, prompt_keys
from support.transfers import Process, World

from p2pdyn.core.lease import GRANTED, LEASE_S, QUARANTINED, Reply, longest_read
from p2pdyn.core.pull import CLAIMING, FAILED, FILLED, REPLY_S, StartRead
from p2pdyn.core.types import NodeId
from p2pdyn.wire.requests import Claim, Commit, Committed, Granted, Renew, Renewed, Return

PROCESSES = st.integers(0, 2)
PROMPTS = st.integers(0, 3)
DEPTHS = st.integers(1, DEPTH)
STEP_S = 0.05
BEFORE_S = (0.05, 0.3, 0.6, 1.05)
PACES_S = (0.3, 1.0)
TROUBLES = ("owner stands", "borrower stands", "owner anew", "cancel", "owner", "borrower")

QUIET_S = LEASE_S + longest_read(DEPTH * BLOCK_BYTES) + REPLY_S
"""After this long without anything new, nothing is held for anybody."""


class Transfers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(0, 0)

    @initialize(seed=st.integers(0, 2**32), pace=st.sampled_from((0.02, 0.4, 1.0)), delay=st.sampled_from((0.0, 0.2)))
    def start(self, seed: int, pace: float, delay: float) -> None:
        self.world = World(seed, 3)
        self.world.pace, self.world.delay = pace, delay

    def process(self, number: int) -> Process:
        return self.world.processes[number]

    def awake(self, number: int) -> Process | None:
        """The process once it has done all that is due, if it runs."""
        process = self.process(number)
        process.work()
        if process.frozen:
            return None
        process.tick()
        return process

    def calm(self) -> None:
        world = self.world
        world.deaf = False
        world.delay = world.loss = world.stubborn = world.skewed = world.breaking = world.churning = 0.0
        for number, process in enumerate(world.processes):
            process.frozen = process.stalled = False
            self.awake(number)

    def pass_time(self, seconds: float) -> None:
        until = self.world.time + seconds
        while self.world.time < until:
            self.world.step(STEP_S)

    # What is asked of them

    @rule(owner=PROCESSES, borrower=PROCESSES, prompt=PROMPTS, depth=DEPTHS, mistaken=st.sampled_from((0, 0, 0, 1)))
    def prefill(self, owner: int, borrower: int, prompt: int, depth: int, mistaken: int) -> None:
        """``mistaken``: it is taken for another prompt, which begins alike."""
        keys, wanted = prompt_keys(prompt, depth), prompt_keys(prompt ^ mistaken, depth)
        self.world.prefill(self.process(owner), self.process(borrower), keys, wanted)
        self.pass_time(STEP_S)

    @rule(
        owner=PROCESSES,
        borrower=PROCESSES,
        prompt=PROMPTS,
        depth=DEPTHS,
        warm=st.integers(0, DEPTH),
        stale=st.booleans(),
    )
    def pull_prefix(self, owner: int, borrower: int, prompt: int, depth: int, warm: int, stale: bool) -> None:
        """``warm`` blocks of it are in the owner's cache; ``stale``: the router speaks of an earlier life."""
        source, process, keys = self.process(owner), self.process(borrower), prompt_keys(prompt, depth)
        source.engine.serve(keys[:warm])
        epoch = source.epoch - stale
        process.post(lambda: process.begin(source.name, epoch, 0, keys))
        self.pass_time(STEP_S)

    @precondition(lambda self: self.world.handed)
    @rule(borrower=PROCESSES, data=st.data())
    def migrate(self, borrower: int, data: st.DataObject) -> None:
        """Somebody else gets a lease that was given out before."""
        owner, epoch, lease, keys = data.draw(st.sampled_from(self.world.handed))
        self.process(borrower).post(lambda: self.process(borrower).begin(owner.name, epoch, lease, keys))

    @rule(number=PROCESSES, data=st.data(), cannot=st.booleans())
    def give_up(self, number: int, data: st.DataObject, cannot: bool) -> None:
        process = self.process(number)
        keys = [*process.borrower.pulls, *(one.key for one in process.engine.queue)]
        if keys:
            key = data.draw(st.sampled_from(keys))
            process.post(lambda: process.cannot(key) if cannot else process.cancel(key))

    @rule(owner=PROCESSES, data=st.data())
    def cancel_lease(self, owner: int, data: st.DataObject) -> None:
        process = self.process(owner)
        if process.lender.leases:
            lease = data.draw(st.sampled_from(list(process.lender.leases)))
            process.post(lambda: process.cancel_lease(lease))

    @rule(seconds=st.sampled_from((0.1, 0.3, 0.7, 1.5, 3.0)))
    def advance(self, seconds: float) -> None:
        self.pass_time(seconds)

    # What goes wrong

    @rule(
        delay=st.sampled_from((0.0, 0.0, 0.2, 0.8, 3.0)),
        loss=st.sampled_from((0.0, 0.0, 0.1, 0.5)),
        churning=st.sampled_from((0.0, 0.1, 0.9)),
    )
    def weather(self, delay: float, loss: float, churning: float) -> None:
        """``churning``: how often an engine's free blocks go to other prompts."""
        self.world.delay, self.world.loss, self.world.churning = delay, loss, churning

    @rule(
        pace=st.sampled_from((0.02, 0.4, 1.0)),
        stubborn=st.sampled_from((0.0, 0.5)),
        skewed=st.sampled_from((0.0, 0.3)),
        breaking=st.sampled_from((0.0, 0.0, 0.3)),
    )
    def mover(self, pace: float, stubborn: float, skewed: float, breaking: float) -> None:
        world = self.world
        world.pace, world.stubborn, world.skewed, world.breaking = pace, stubborn, skewed, breaking

    @rule(number=PROCESSES, seconds=st.sampled_from((0.3, 1.2, 2.5, 6.0)))
    def freeze(self, number: int, seconds: float) -> None:
        """A process stands still, and the others go on."""
        process = self.process(number)
        process.frozen = True
        self.pass_time(seconds)
        process.frozen = False
        self.awake(number)

    @rule(number=PROCESSES, frozen=st.booleans(), stalled=st.booleans())
    def hang(self, number: int, frozen: bool, stalled: bool) -> None:
        """A process, or its engine, stands still until another such."""
        self.process(number).frozen, self.process(number).stalled = frozen, stalled
        self.awake(number)

    @rule(
        owner=PROCESSES,
        other=st.integers(1, 2),
        prompt=PROMPTS,
        pace=st.sampled_from(PACES_S),
        before=st.sampled_from(BEFORE_S),
        deaf=st.booleans(),
        what=st.sampled_from(TROUBLES),
        seconds=st.sampled_from((0.8, 1.9, 2.3, 3.5, 6.0)),
    )
    def amid(
        self, owner: int, other: int, prompt: int, pace: float, before: float, deaf: bool, what: str, seconds: float
    ) -> None:
        """A transfer that takes its time in a calm, and somewhere in it a pause of either side, a life of the owner
        that lends the same under the same lease, a cancel, or the death of either engine; other prompts behind it."""
        world, source, borrower = self.world, self.process(owner), (owner + other) % 3
        self.calm()
        world.delay, world.pace, world.deaf = 0.1, pace, deaf
        self.prefill(owner, borrower, prompt, DEPTH, 0)
        self.pass_time(before)
        match what:
            case "owner stands" | "borrower stands":
                self.freeze(owner if what == "owner stands" else borrower, seconds)
            case "owner anew":
                world.restart(source, tell=False, keep=True)
                self.prefill(owner, borrower, prompt ^ 1, DEPTH, 0)
            case "cancel":
                for lease in list(source.lender.leases):
                    source.post(partial(source.cancel_lease, lease))
            case "owner" | "borrower":
                world.engine_dies(source if what == "owner" else self.process(borrower))
        source.engine.churn(0.9)
        self.pass_time(0.3)

    @rule(
        number=PROCESSES,
        other=PROCESSES,
        kind=st.sampled_from(("link", "link", "restart", "engine", "epoch")),
        tell=st.booleans(),
        keep=st.booleans(),
    )
    def trouble(self, number: int, other: int, kind: str, tell: bool, keep: bool) -> None:
        world, process = self.world, self.process(number)
        if kind == "link":
            world.break_link(world.links[process.name, self.process(other).name], tell, keep)
        elif kind == "restart":
            world.restart(process, tell, keep)
        elif kind == "engine":
            world.engine_dies(process)
        else:
            process.post(process.raise_epoch)

    @rule(number=PROCESSES, data=st.data())
    def impostor(self, number: int, data: st.DataObject) -> None:
        """Somebody answers who was not asked."""
        process, stranger = self.awake(number), NodeId("stranger")
        if process is None or not process.borrower.pulls:
            return
        pull = data.draw(st.sampled_from(list(process.borrower.pulls.values())))
        before = pull.state
        granted = Granted(pull.ticket, pull.lease, bytes(4), bytes(4))
        assert process.borrower.granted(stranger, granted, process.now) == []
        assert process.borrower.renewed(stranger, Renewed(pull.lease, False), process.now) == []
        assert process.borrower.committed(stranger, Committed(pull.ticket, True), process.now) == []
        assert pull.state == before

    @rule(owner=PROCESSES, prompt=PROMPTS, seconds=st.sampled_from((0.2, 0.7, 2.5)))
    def stall_amid(self, owner: int, prompt: int, seconds: float) -> None:
        """Two want prefixes of an owner whose engine has just begun something long."""
        source = self.process(owner)
        source.stalled = True
        self.pull_prefix(owner, (owner + 1) % 3, prompt, DEPTH, warm=DEPTH, stale=False)
        self.pull_prefix(owner, (owner + 2) % 3, (prompt + 2) % 4, DEPTH, warm=DEPTH, stale=False)
        self.pass_time(seconds)
        source.stalled = False
        self.pass_time(STEP_S)

    @rule(number=PROCESSES, data=st.data())
    def intruder(self, number: int, data: st.DataObject) -> None:
        """Somebody speaks of a lease that another has, or that has expired."""
        process = self.awake(number)
        if process is None or not process.lender.leases:
            return
        lender, lease = process.lender, data.draw(st.sampled_from(list(process.lender.leases.values())))
        before = (lease.state, lease.until)
        now, number, epoch, stranger = process.now, lease.number, process.epoch, b"c0"
        assert lender.commit(stranger, Commit(1, number, epoch), now) == [Reply(stranger, Committed(1, False))]
        if lease.state != GRANTED:
            who = lease.borrower if lease.state == QUARANTINED else stranger
            (refusal,) = lender.claim(who, Claim(1, number, epoch, b"".join(lease.held.keys)), now)
            assert isinstance(refusal, Reply)
            assert isinstance(refusal.message, Granted)
            assert not refusal.message.blocks
            assert lender.renew(who, Renew(number, epoch), now) == [Reply(who, Renewed(number, False))]
            assert lender.give_back(stranger, Return(number, epoch), now) == []
        assert lender.leases[lease.number] is lease
        assert (lease.state, lease.until) == before

    @rule(number=PROCESSES, data=st.data(), blocks=st.binary(max_size=20), generations=st.binary(max_size=20))
    def nonsense(self, number: int, data: st.DataObject, blocks: bytes, generations: bytes) -> None:
        """An owner's Granted that can not be right is nothing to read by."""
        process = self.awake(number)
        claiming = [one for one in process.borrower.pulls.values() if one.state == CLAIMING] if process else []
        if process is None or not claiming:
            return
        pull = data.draw(st.sampled_from(claiming))
        if len(blocks) == len(generations) and not len(blocks) % 4:
            blocks += b"?"
        granted = Granted(pull.ticket, pull.lease, blocks, generations)
        actions = process.borrower.granted(pull.source, granted, process.now)
        assert not any(isinstance(action, StartRead) for action in actions)
        process.do(actions)

    # What must hold

    @invariant()
    def check(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """All is well again, nothing new comes: in time nothing is held, and then transfers work."""
        world = self.world
        if not world.processes:
            return
        self.calm()
        world.pace = 0.0
        for read in world.reads:
            read.next_at, read.pace = world.time, 0.0
        for link in world.links.values():
            for letter in [*link.asks, *(one for queue in link.replies.values() for one in queue)]:
                letter.due = world.time
        for process in world.processes:
            for waiting in list(process.engine.queue):
                process.cancel(waiting.key)
        self.pass_time(QUIET_S)
        self.idle()
        self.transfer()

    def idle(self) -> None:
        assert not self.world.reads
        for process in self.world.processes:
            process.do(process.lender.tick(process.now))
            process.do(process.borrower.tick(process.now))
            assert not any(process.lender.states().values())
            assert not any(process.borrower.states().values())
            assert process.lender.blocks == 0
            assert process.lender.next_deadline() is None
            assert process.borrower.next_deadline() is None
            engine = process.engine
            assert not any(engine.refs), f"{engine.held} {engine.limbo} {engine.reserved}"
            assert not engine.reserved
            assert not engine.held
            assert set(process.reading.values()) <= {1}

    def transfer(self) -> None:
        """From the first to the second as a hand-over, from there to the third as a prefix, whose begin it has."""
        first, second, third = self.world.processes
        for process in self.world.processes:
            process.engine.churn(1.0)
        keys = prompt_keys(0, DEPTH)
        self.world.prefill(first, second, keys)
        self.pass_time(1.0)
        assert second.engine.run(keys)
        assert second.borrower.outcomes["filled"] > 0
        third.engine.serve(keys[:1])
        filled = third.engine.filled
        third.begin(second.name, second.epoch, 0, keys)
        self.pass_time(1.0)
        assert third.engine.filled == filled + DEPTH - 1
        self.idle()


TestTransfers = Transfers.TestCase
TestTransfers.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("what", TROUBLES)
@pytest.mark.parametrize("pace", PACES_S)
def test_each_trouble_amid_a_transfer(what: str, pace: float) -> None:
    """The rule that finds most, at every moment: chance alone leaves some of it out in most runs."""
    for seed, (tenths, deaf) in enumerate(product(range(1, 16, 2), (False, True))):
        machine: Any = Transfers()
        machine.start(seed, pace, 0.0)
        machine.amid(0, 1, 0, pace, tenths / 10, deaf, what, 3.5)
        machine.teardown()


@pytest.mark.parametrize("fault", ["skewed", "breaking", "slow", "slow and stubborn"])
def test_each_fault_of_a_mover(fault: str) -> None:
    for seed in range(4):
        machine: Any = Transfers()
        machine.start(seed, 3.0 if "slow" in fault else 0.1, 0.0)
        machine.world.skewed, machine.world.breaking = float(fault == "skewed"), float(fault == "breaking")
        machine.world.stubborn = float("stubborn" in fault)
        machine.prefill(0, 1, 0, DEPTH, 0)
        machine.pass_time(7.0)
        borrower = machine.process(1).borrower
        assert (borrower.outcomes[FILLED], borrower.outcomes[FAILED]) == (0, 1)
        machine.teardown()
