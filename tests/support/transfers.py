"""Engines' memory, one-sided reads, links and processes around the cores of KV transfers, in virtual time.

Nothing here is kinder than the world: blocks that nobody refers to are given to other prompts at any time, a read takes
block by block whatever lies there at that moment (in whatever life of the owner), engines work on while their peer
stands still, and what comes meanwhile is handled, late, in the order in which it came.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from p2pdyn.core import lease as leases
from p2pdyn.core import pull as pulls
from p2pdyn.core.lease import LEASE_S, Lender, Reply, longest_read
from p2pdyn.core.pull import REPLY_S, Ask, Borrower, CancelRead, StartRead
from p2pdyn.core.types import NodeId
from p2pdyn.engines.base import Held, Pin, Release, Reserved, Settle
from p2pdyn.wire.requests import Claim, Commit, Committed, Granted, Renew, Renewed, Return
from support.transfer_engine import BLOCK_BYTES, BLOCKS, Engine, Waiting

EPSILON = 1e-6
LATE_S = 0.2
"""No core hears of the time more exactly."""


@dataclass(eq=False)
class Read:
    """``next_at`` is when its next block is there; the tags come one block's time after the last."""

    process: Process
    ticket: int
    lease: int
    engine: Engine
    order: StartRead
    lent: Engine | None
    """Whose blocks these are, if they were under the lease when it began."""
    since: float
    pace: float
    next_at: float
    stubborn: bool
    """Cancelling it takes as long as finishing it."""
    skew: int
    """The mover's fault: it reads this many blocks beside the right ones."""
    breaks_at: int
    """Blocks until an error."""
    tags: list[tuple[bytes, int, int] | None]
    """If they are read before the blocks; nothing promises an order."""
    place: int = 0
    cancelled: bool = False

    def remote(self, place: int) -> int:
        return (self.order.remote[place] + self.skew) % BLOCKS

    def read_tags(self, source: Engine) -> None:
        self.tags = [source.tags[self.remote(place)] for place in range(len(self.order.remote))]


@dataclass
class Letter:
    message: Any
    due: float
    sent: float = 0.0
    """When the Renew or Claim was sent that this is, or answers."""


@dataclass
class Link:
    """From a borrower to an owner. A connection ends with either process or with the link; what was asked but not sent
    yet goes over the next one, an answer never does."""

    borrower: Process
    owner: Process
    connection: bytes
    asks: deque[Letter] = field(default_factory=deque)
    replies: dict[type, deque[Letter]] = field(default_factory=dict)
    claims: dict[int, Letter] = field(default_factory=dict)
    """By ticket."""


class Process:
    """One peer: an engine, a lender, a borrower. ``offset`` is its clock's."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.name = NodeId(f"node{number}")
        self.offset = world.rng.uniform(0, 1000)
        self.epoch = 0
        self.sequence = 0
        self.boot()

    def boot(self) -> None:
        """A new life: another epoch, empty memory."""
        self.epoch += 10
        self.frozen = False
        self.stalled = False
        self.working = False
        self.inbox: deque[Callable[[], object]] = deque()
        self.engine = self.new_engine()
        # As each life draws the same, only the epoch tells one's leases from another's.
        self.drawn = 1000 * (self.number + 1)
        self.lender = Lender(self.epoch, self.draw, BLOCKS, BLOCK_BYTES)
        self.borrower = Borrower(BLOCK_BYTES)
        self.touched: dict[int, float] = {}
        """By lease of ours, when it was last granted or renewed, on our clock."""
        self.stopped: set[int] = set()
        """Leases of ours that may not be committed any more."""
        self.answered: dict[int, float] = {}
        """By lease of another's, when that was sent which was answered last."""
        self.leases: set[int] = set()
        """Of others, that we know of."""
        self.begun = 0
        self.reading: dict[int, int] = {}
        """How often read_over came by ticket."""

    def draw(self) -> int:
        self.drawn += 1
        return self.drawn

    def new_engine(self) -> Engine:
        return Engine(self.epoch, self.world.rng, lambda note: self.post(partial(self.noted, note)))

    @property
    def now(self) -> float:
        return self.world.time + self.offset

    def post(self, event: Callable[[], object]) -> None:
        self.inbox.append(event)
        self.work()

    def work(self) -> None:
        """Handle what has come, one after the other, even if one brings the next."""
        while self.inbox and not self.frozen and not self.working:
            self.working = True
            self.inbox.popleft()()
            self.working = False

    # Events

    def noted(self, note: Held | Reserved) -> None:
        if isinstance(note, Reserved):
            self.do(self.borrower.reserved(note, self.now))
        elif note.key < 0:
            self.do(self.lender.pinned(note, self.now))
        else:
            number, actions = self.lender.handed_over(note, self.now)
            self.do(actions)
            if number:
                self.world.handed_over(self, number, note)

    def begin(self, source: NodeId, epoch: int, lease: int, keys: tuple[bytes, ...]) -> None:
        self.sequence += 1
        key = self.sequence
        self.begun += 1
        self.leases.add(lease)
        self.engine.queue.append(Waiting(key, keys))
        self.do(self.borrower.begin(key, source, epoch, lease, self.now))

    def cancel(self, key: int) -> None:
        if self.world.rng.random() < 0.5:  # before or after the peer's own bookkeeping
            self.engine.abort(key)
        self.do(self.borrower.cancel(key, self.now))
        self.engine.abort(key)

    def read_over(self, ticket: int, error: str, right: bool) -> None:
        self.reading[ticket] += 1
        self.do(self.borrower.read_over(ticket, error, right, self.now))

    def source_lost(self, source: NodeId) -> None:
        self.do(self.borrower.source_lost(source, self.now))

    def cannot(self, key: int) -> None:
        self.do(self.borrower.cannot(key, self.now))

    def cancel_lease(self, lease: int) -> None:
        if lease in self.lender.leases:
            self.stopped.add(lease)
        self.do(self.lender.cancel(lease, self.now))

    def engine_died(self) -> None:
        self.engine = self.new_engine()
        self.do([*self.borrower.clear(self.now), *self.lender.engine_died()])

    def raise_epoch(self) -> None:
        self.epoch += 1
        self.engine.epoch = self.epoch
        self.stopped |= set(self.lender.leases)
        self.do(self.lender.raise_epoch(self.epoch, self.now))
        assert set(self.lender.states().items()) >= {("granted", 0), ("claimed", 0)}

    def tick(self) -> None:
        for core in (self.lender, self.borrower):
            for _ in range(3):
                due = core.next_deadline()
                if due is None or due > self.now:
                    break
                self.do(core.tick(self.now))
            else:
                raise AssertionError("it is due for ever")

    # Actions

    def do(self, actions: Sequence[leases.Action | pulls.Action]) -> None:
        for action in actions:
            match action:
                case Reply():
                    self.world.reply(self, action)
                case Ask():
                    self.ask(action)
                case StartRead():
                    self.start(action)
                case CancelRead():
                    assert action.ticket in self.reading
                    for read in self.world.reads_of(self, action.ticket):
                        read.cancelled = True
                case Pin():
                    assert action.key < 0
                    self.engine.orders.append(action)
                case Release() | Settle():
                    self.engine.orders.append(action)

    def ask(self, ask: Ask) -> None:
        message = ask.message
        assert message.lease in self.leases or isinstance(message, Claim)
        if isinstance(message, Commit | Return):
            under_way = [read for read in self.world.reads if read.process is self and read.lease == message.lease]
            assert not under_way, f"{message} while it is being read"
        if isinstance(message, Commit):
            assert self.reading[message.ticket] == 1
            (pull,) = [one for one in self.borrower.pulls.values() if one.ticket == message.ticket]
            assert self.now < pull.deadline
        self.world.send(self, ask)

    def start(self, order: StartRead) -> None:
        assert order.ticket not in self.reading
        self.reading[order.ticket] = 0
        pull = next(pull for pull in self.borrower.pulls.values() if pull.ticket == order.ticket)
        note = self.engine.reserved.get(pull.key)
        if note is not None:  # or the engine is dead, and we have not heard
            assert order.local == note.blocks[: len(order.local)]
        assert len(order.local) == len(order.remote) == len(order.tags) > 0
        self.world.start(self, order, pull.lease)


class World:
    """Everything between the processes. Its moods (``loss`` and the like) are set from outside."""

    def __init__(self, seed: int, count: int) -> None:
        self.rng = random.Random(seed)
        self.time = 0.0
        self.connections = 0
        self.loss = 0.0
        self.deaf = False
        """Every Renewed is lost."""
        self.delay = 0.0
        self.pace = 0.0
        self.stubborn = 0.0
        self.skewed = 0.0
        self.breaking = 0.0
        self.churning = 0.0
        self.processes = [Process(self, number) for number in range(count)]
        self.links = {
            (a.name, b.name): Link(a, b, self.new_connection()) for a in self.processes for b in self.processes
        }
        self.reads: list[Read] = []
        self.wishes: dict[tuple[NodeId, int], tuple[Process, tuple[bytes, ...]]] = {}
        """By owner and sequence, who shall go on with a prompt that is handed over, and what it takes it for."""
        self.handed: deque[tuple[Process, int, int, tuple[bytes, ...]]] = deque(maxlen=8)
        """(owner, epoch, lease, keys)."""

    def new_connection(self) -> bytes:
        self.connections += 1
        return b"c%d" % self.connections

    def named(self, name: NodeId) -> Process:
        return next(process for process in self.processes if process.name == name)

    # Prompts

    def prefill(
        self, owner: Process, borrower: Process, keys: tuple[bytes, ...], wanted: tuple[bytes, ...] = ()
    ) -> None:
        owner.sequence += 1
        self.wishes[owner.name, owner.sequence] = borrower, wanted or keys
        if not owner.engine.dead:
            owner.engine.hand_over(owner.sequence, keys)

    def handed_over(self, owner: Process, lease: int, held: Held) -> None:
        owner.touched[lease] = owner.now
        self.handed.append((owner, owner.epoch, lease, held.keys))
        borrower, wanted = self.wishes.pop((owner.name, held.key))
        borrower.post(partial(borrower.begin, owner.name, owner.epoch, lease, wanted))

    # Links

    def send(self, process: Process, ask: Ask) -> None:
        link = self.links[process.name, ask.source]
        if self.rng.random() < self.loss:
            return
        due = max(self.time + self.rng.uniform(0, self.delay), link.asks[-1].due if link.asks else 0.0)
        link.asks.append(Letter(ask.message, due, self.time))
        if isinstance(ask.message, Claim):
            link.claims[ask.message.ticket] = link.asks[-1]

    def reply(self, owner: Process, action: Reply) -> None:
        assert int(action.connection[1:]) <= self.connections
        message = action.message
        if isinstance(message, Granted) and message.blocks:
            owner.touched[message.lease] = owner.now
        for link in self.links.values():
            if link.connection != action.connection:
                continue
            assert link.owner is owner
            if isinstance(message, Granted) and message.blocks:
                self.judge_grant(owner, link.claims[message.ticket].message, message)
            if self.rng.random() >= self.loss and not (self.deaf and isinstance(message, Renewed)):
                queue = link.replies.setdefault(type(message), deque())
                due = max(self.time + self.rng.uniform(0, self.delay), queue[-1].due if queue else 0.0)
                queue.append(Letter(message, due, self.asked_at(link, message)))

    def asked_at(self, link: Link, message: Granted | Renewed | Committed) -> float:
        return link.claims[message.ticket].sent if isinstance(message, Granted) else self.renewing

    renewing = 0.0
    """When the Renew was sent that is being answered."""

    def break_link(self, link: Link, tell: bool, keep: bool) -> None:
        link.connection = self.new_connection()
        link.replies.clear()
        if not keep:
            link.asks.clear()
        if tell:
            link.borrower.post(partial(link.borrower.source_lost, link.owner.name))

    def deliver(self) -> None:
        for link in self.links.values():
            while link.asks and link.asks[0].due <= self.time:
                link.owner.post(partial(self.asked, link.owner, link.connection, link.asks.popleft()))
            ready = [kind for kind, queue in link.replies.items() if queue and queue[0].due <= self.time]
            self.rng.shuffle(ready)
            for kind in ready:
                queue = link.replies[kind]
                while queue and queue[0].due <= self.time:
                    link.borrower.post(partial(self.answered, link.borrower, link.owner.name, queue.popleft()))

    def asked(self, owner: Process, connection: bytes, letter: Letter) -> None:
        message, lender = letter.message, owner.lender
        self.renewing = letter.sent
        match message:
            case Claim():
                actions = lender.claim(connection, message, owner.now)
            case Renew():
                actions = lender.renew(connection, message, owner.now)
            case Commit():
                actions = lender.commit(connection, message, owner.now)
            case Return():
                actions = lender.give_back(connection, message, owner.now)
        for action in actions:
            if isinstance(action, Reply) and action.connection == connection:
                self.judge(owner, message, action.message)
        owner.do(actions)

    def judge(self, owner: Process, message: Any, answer: Granted | Renewed | Committed) -> None:
        """What an owner may say yes to."""
        if not (answer.blocks if isinstance(answer, Granted) else answer.held):
            return
        assert message.epoch == owner.epoch, f"{message} is for an earlier life"
        if message.lease:
            assert owner.now < owner.touched[message.lease] + LEASE_S, "the lease had expired"
        if isinstance(answer, Renewed):
            owner.touched[message.lease] = owner.now
        assert message.lease not in owner.stopped, "the lease had been cancelled"

    def judge_grant(self, owner: Process, claim: Claim, answer: Granted) -> None:
        """Whoever is granted blocks gets those that it asked for, of this life."""
        assert claim.epoch == owner.epoch, f"{claim} is for an earlier life"
        keys = b"".join(owner.engine.content[block] for block in array("I", answer.blocks))
        assert claim.keys.startswith(keys), f"{claim} was granted {keys!r}"

    def answered(self, process: Process, source: NodeId, letter: Letter) -> None:
        message, borrower, now = letter.message, process.borrower, process.now
        if isinstance(message, Granted) and message.blocks:
            process.leases.add(message.lease)
            process.answered[message.lease] = max(process.answered.get(message.lease, 0.0), letter.sent)
        if isinstance(message, Renewed) and message.held:
            process.answered[message.lease] = max(process.answered.get(message.lease, 0.0), letter.sent)
        if isinstance(message, Granted):
            actions = borrower.granted(source, message, now)
        elif isinstance(message, Renewed):
            actions = borrower.renewed(source, message, now)
        else:
            pull = next((one for one in borrower.pulls.values() if one.ticket == message.ticket), None)
            actions = borrower.committed(source, message, now)
            if any(isinstance(action, Settle) and action.filled for action in actions):
                assert pull is not None
                assert self.time < process.answered[pull.lease] + LEASE_S + EPSILON, "used after its deadline"
        process.do(actions)

    # Reads

    def reads_of(self, process: Process, ticket: int) -> list[Read]:
        return [read for read in self.reads if read.process is process and read.ticket == ticket]

    def start(self, process: Process, order: StartRead, lease: int) -> None:
        pace = self.rng.uniform(0.5, 1.0) * self.pace
        stubborn, skewed = self.rng.random() < self.stubborn, self.rng.random() < self.skewed
        breaks = self.rng.randrange(len(order.remote)) if self.rng.random() < self.breaking else -1
        owner = self.named(order.source)
        lent = owner.engine if lease in owner.lender.leases and order.tags[0][1] == owner.epoch else None
        self.reads.append(
            Read(
                process, order.ticket, lease, process.engine, order, lent, self.time, pace, self.time + pace,
                stubborn, self.rng.randint(1, BLOCKS - 1) if skewed else 0, breaks, [],
            )
        )  # fmt: skip
        if self.rng.random() < 0.5:
            self.reads[-1].read_tags(owner.engine)

    def move(self) -> None:
        for read in list(self.reads):
            source = self.named(read.order.source).engine
            while read in self.reads and read.next_at <= self.time:
                read.next_at += read.pace
                if read.cancelled and not read.stubborn:
                    self.finish(read, "cancelled", False)
                elif read.place == read.breaks_at:
                    self.finish(read, "broken", False)
                elif read.place < len(read.order.local):
                    read.engine.content[read.order.local[read.place]] = source.content[read.remote(read.place)]
                    read.place += 1
                else:
                    if not read.tags:
                        read.read_tags(source)
                    self.finish(read, "", tuple(read.tags) == read.order.tags)

    def finish(self, read: Read, error: str, right: bool) -> None:
        self.reads.remove(read)
        read.process.post(partial(read.process.read_over, read.ticket, error, right))

    # Lives

    def restart(self, process: Process, tell: bool, keep: bool) -> None:
        """What it was reading ends with it."""
        self.reads = [read for read in self.reads if read.process is not process]
        process.boot()
        for link in self.links.values():
            if link.borrower is process:
                self.break_link(link, tell=False, keep=False)
                link.claims.clear()
            elif link.owner is process:
                self.break_link(link, tell, keep)

    def engine_dies(self, process: Process) -> None:
        """Reads go on, into memory that nobody looks at."""
        process.engine.dead = True
        process.post(process.engine_died)

    # Time

    def step(self, seconds: float) -> None:
        self.time += seconds
        self.deliver()
        for process in self.processes:
            process.work()
            if not process.frozen:
                process.tick()
            if not process.stalled:
                self.step_engine(process)
        self.move()
        self.check()

    def step_engine(self, process: Process) -> None:
        """No block comes back while a read that keeps to its time is on it."""
        engine = process.engine
        engine.step()
        for read in self.reads:
            if read.lent is engine:
                late = self.time >= read.since + longest_read(len(read.order.remote) * BLOCK_BYTES)
                lost = set(read.order.remote) & set(engine.released) & set(engine.free())
                assert late or not lost, f"{lost} came back while {read.order} was under way"
        if self.rng.random() < self.churning:
            engine.churn(self.rng.random())

    def check(self) -> None:
        for process in self.processes:
            if process.engine.dead:
                continue
            process.engine.check()
            lender, borrower = process.lender, process.borrower
            assert lender.blocks <= BLOCKS // 2
            assert (
                sum(borrower.outcomes.values())
                + sum(count for state, count in borrower.states().items() if state not in ("draining", "unanswered"))
                == process.begun
            )
            assert borrower.failures.total() == borrower.outcomes["failed"]
            for pull in borrower.pulls.values():
                self.check_deadline(process, pull)
        for read in self.reads:
            late = self.time > read.since + longest_read(len(read.order.remote) * BLOCK_BYTES) + LATE_S
            assert read.cancelled or read.process.frozen or not late, "it reads for ever"

    def check_deadline(self, process: Process, pull: pulls.Pull) -> None:
        """Whoever reads takes its lease for over before its owner does, and waits for no answer for long."""
        if pull.state in ("claiming", "committing"):
            assert pull.until <= process.now + REPLY_S
        owner = self.named(pull.source)
        lease = owner.lender.leases.get(pull.lease)
        if pull.state not in ("reading", "committing") or lease is None or pull.epoch != owner.epoch:
            return
        if lease.state == "claimed" and lease.borrower == self.links[process.name, owner.name].connection:
            assert pull.deadline - process.offset <= lease.until - owner.offset + EPSILON
