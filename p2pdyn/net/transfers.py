"""One worker's KV transfers: lends its blocks to other workers, borrows theirs.

Decisions are in :mod:`p2pdyn.core.lease` (the owner's side) and :mod:`p2pdyn.core.pull` (the reader's); the bytes are
moved by :mod:`p2pdyn.transfer`.  This shell owns the links to owners, the mover and one timer, and carries actions out.
The mover is made when it is first needed, or at once in a worker whose role needs it: it takes memory and threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from secrets import randbits
from typing import Any, NamedTuple

from p2pdyn.constants import LINK_IDLE_S
from p2pdyn.core.lease import Lender, Reply
from p2pdyn.core.pull import Ask, Borrower, CancelRead, StartRead
from p2pdyn.core.types import Address, NodeId
from p2pdyn.engines.base import EngineInfo, Held, Pin, Release, Reserved, Settle, TransferOrder
from p2pdyn.engines.lending import TAG
from p2pdyn.engines.runner import Runner
from p2pdyn.net.sockets import Sockets
from p2pdyn.net.worker_link import WorkerLink
from p2pdyn.transfer.base import Mover, Region, TransferError
from p2pdyn.wire.codec import encode
from p2pdyn.wire.requests import Claim, Commit, Committed, Granted, Hello, Renew, Renewed, Return

log = logging.getLogger(__name__)

LEASE_BITS = 63
AGAIN_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Before another try to meet an owner, whose mover may just be coming up; the last one from there on."""


class Owner(NamedTuple):
    """A worker that lives, as membership has it."""

    epoch: int
    requests: Address
    ready: bool
    """It is a prefill worker of our model and compatible: we shall pull from it."""


@dataclass(slots=True)
class Source:
    """An owner that we read from. ``met``: the mover can read there; until then reads wait in ``waiting``."""

    link: WorkerLink
    name: str
    """To the mover."""
    host: str
    used: float
    met: bool = False
    meeting: asyncio.Task[None] | None = None
    waiting: list[StartRead] = field(default_factory=list)


class Transfers:
    """``answer(connection, message)`` sends on the worker's ROUTER; ``owner(node)`` is what membership knows of a
    worker; ``make_mover(regions, held)`` builds the mover, or raises TransferError."""

    def __init__(
        self,
        sockets: Sockets,
        node: NodeId,
        epoch: int,
        runner: Runner,
        info: EngineInfo,
        answer: Callable[[bytes, object], None],
        owner: Callable[[NodeId], Owner | None],
        make_mover: Callable[[Sequence[Region], Callable[[int], bool]], Mover],
    ) -> None:
        assert runner.memory is not None
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._hello = Hello(node, epoch)
        self._runner = runner
        self._answer = answer
        self._owner = owner
        self._make_mover = make_mover
        self._mover: Mover | None = None
        self._starting: asyncio.Task[None] | None = None
        self._describable = False
        self._memory = runner.memory
        self._tags = info.kv_blocks * info.block_bytes
        self.block_bytes = info.block_bytes
        self.lender = Lender(epoch, partial(randbits, LEASE_BITS), info.kv_blocks, info.block_bytes)
        self.borrower = Borrower(info.block_bytes)
        self._sources: dict[NodeId, Source] = {}
        self._reads: dict[int, int] = {}
        """Ticket of the borrower -> the mover's."""
        self._handed: dict[tuple[bytes, int, int], int] = {}
        """Hand-overs, by request -> lease, until the lease has ended."""
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    # Lending.

    def handed_over(self, held: Held, connection: bytes, rid: int, attempt: int) -> int:
        """A prompt to hand over is computed: the lease under which its blocks are held, or 0."""
        lease, actions = self.lender.handed_over(held, self._loop.time())
        if lease:
            self._handed[connection, rid, attempt] = lease
        self._carry_out(actions)
        return lease

    def given_up(self, connection: bytes, requests: Iterable[tuple[int, int]]) -> None:
        """Frontends cancelled requests: those that were handed over already are wanted no more."""
        if self._handed:
            for rid, attempt in requests:
                lease = self._handed.pop((connection, rid, attempt), None)
                if lease is not None:
                    self._carry_out(self.lender.cancel(lease, self._loop.time()))

    def lend(self, connection: bytes, message: object) -> None:
        """A borrower's Claim, Renew, Commit or Return."""
        now = self._loop.time()
        match message:
            case Claim():
                self._carry_out(self.lender.claim(connection, message, now))
            case Renew():
                self._carry_out(self.lender.renew(connection, message, now))
            case Commit():
                self._carry_out(self.lender.commit(connection, message, now))
            case Return():
                self._carry_out(self.lender.give_back(connection, message, now))

    def start(self) -> None:
        """This worker's role is to give or to take blocks: have the mover at once."""
        self._made_mover()

    def describe(self) -> bytes:
        """What another worker's mover needs to read from here; empty while nothing can be read."""
        mover = self._made_mover()
        return mover.describe() if mover is not None and self._describable else b""

    # Borrowing.

    def begin(self, key: int, source: NodeId, epoch: int, lease: int) -> bool:
        """A sequence comes whose first blocks ``source`` has. False: compute them, it cannot be reached, or not yet and
        it has computed nothing for this sequence (``lease`` 0): the next one will find it met."""
        now = self._loop.time()
        known = self._source(source, epoch, now)
        if known is None or not (lease or known.met):
            return False
        self._carry_out(self.borrower.begin(key, source, epoch, lease, now))
        return True

    def cancel(self, keys: Iterable[int]) -> None:
        """Sequences were aborted."""
        now = self._loop.time()
        for key in keys:
            self._carry_out(self.borrower.cancel(key, now))

    def note(self, note: Held | Reserved) -> None:
        """What the engine tells: blocks reserved for a pull, or pinned for a claim."""
        now = self._loop.time()
        if isinstance(note, Reserved):
            self._carry_out(self.borrower.reserved(note, now))
        else:
            self._carry_out(self.lender.pinned(note, now))

    def meet(self, node: NodeId) -> None:
        """A peer has changed: if we shall pull from it, set the connection up now, before a request waits for that."""
        owner = self._owner(node)
        if owner is not None and owner.ready:
            self._source(node, owner.epoch, self._loop.time())

    # Owners.

    def _source(self, node: NodeId, epoch: int, now: float) -> Source | None:
        owner = self._owner(node)
        if owner is None or owner.epoch != epoch or self._made_mover() is None:
            return None
        source = self._sources.get(node)
        if source is not None and source.link.epoch != epoch:
            self._lost(node)
            source = None
        if source is None:
            link = WorkerLink(
                self._sockets, self._hello, node, epoch, owner.requests, None,
                on_up=self._link_up, on_down=self._link_down, on_message=self._message,
            )  # fmt: skip
            source = self._sources[node] = Source(link, f"{node}-{epoch}", owner.requests.host, now)
        source.used = now
        return source

    def _link_up(self, link: WorkerLink) -> None:
        source = self._sources.get(link.worker)
        if source is not None and source.link is link:
            source.meeting = self._loop.create_task(self._meet(source))

    async def _meet(self, source: Source) -> None:
        """Until it is met, or lost."""
        link, mover = source.link, self._mover
        assert mover is not None
        for tries in count():
            try:
                await mover.ready()
                description = await link.fetch("agent", "")
                await mover.meet(source.name, source.host, description)
                break
            except (TransferError, LookupError, ConnectionError, TimeoutError) as error:
                self._cannot_meet(source, tries, str(error))
            await asyncio.sleep(AGAIN_S[min(tries, len(AGAIN_S) - 1)])
        source.met = True
        waiting, source.waiting = source.waiting, []
        for read in waiting:
            self._read(source, read)

    def _cannot_meet(self, source: Source, tries: int, why: str) -> None:
        log.log(
            logging.WARNING if tries == len(AGAIN_S) else logging.DEBUG,
            "KV blocks cannot be read from worker %s: %s", source.link.worker, why,
        )  # fmt: skip
        if tries + 1 >= len(AGAIN_S):
            waiting, source.waiting = source.waiting, []
            for read in waiting:
                self._over(read, why)

    def _link_down(self, link: WorkerLink, reason: str) -> None:
        log.debug("the link to worker %s, whose KV blocks are read, went down: %s", link.worker, reason)
        source = self._sources.get(link.worker)
        if source is not None and source.link is link:
            self._lost(link.worker)

    def _lost(self, node: NodeId) -> None:
        source = self._sources.pop(node)
        source.link.close()
        if source.meeting is not None:
            source.meeting.cancel()
        now = self._loop.time()
        for read in source.waiting:
            self._over(read, "its link went down")
        if self._mover is not None:
            self._mover.forget(source.name)
        self._carry_out(self.borrower.source_lost(node, now))

    def _message(self, link: WorkerLink, message: Any) -> None:
        now, node = self._loop.time(), link.worker
        match message:
            case Granted():
                self._carry_out(self.borrower.granted(node, message, now))
            case Renewed():
                self._carry_out(self.borrower.renewed(node, message, now))
            case Committed():
                self._carry_out(self.borrower.committed(node, message, now))

    # Reads.

    def _start(self, read: StartRead) -> None:
        source = self._sources.get(read.source)
        if source is None:
            self._loop.call_soon(self._over, read, "the link to its owner is down")
        elif source.met:
            self._read(source, read)
        else:
            source.waiting.append(read)

    def _read(self, source: Source, read: StartRead) -> None:
        assert self._mover is not None
        source.used = self._loop.time()
        self._reads[read.ticket] = self._mover.read(source.name, read.remote, read.local, partial(self._over, read))

    def _over(self, read: StartRead, error: str) -> None:
        """Nothing of this read can be written any more."""
        self._reads.pop(read.ticket, None)
        if not self._closed:
            right = not error and self._tags_right(read)
            self._carry_out(self.borrower.read_over(read.ticket, error, right, self._loop.time()))

    def _tags_right(self, read: StartRead) -> bool:
        memory, start = self._memory, self._tags
        return all(
            memory[at : at + TAG.size] == TAG.pack(*tag)
            for at, tag in zip((start + block * TAG.size for block in read.local), read.tags, strict=True)
        )

    def _cancel_read(self, ticket: int) -> None:
        for source in self._sources.values():
            for read in [read for read in source.waiting if read.ticket == ticket]:
                source.waiting.remove(read)
                self._loop.call_soon(self._over, read, "it was cancelled")
        begun = self._reads.get(ticket)
        if begun is not None and self._mover is not None:
            self._mover.cancel(begun)

    # Actions and time.

    def _carry_out(self, actions: Iterable[object]) -> None:
        orders: list[TransferOrder] = []
        for action in actions:
            match action:
                case Reply():
                    self._answer(action.connection, action.message)
                case Ask():
                    source = self._sources.get(action.source)
                    if source is not None:
                        source.used = self._loop.time()
                        source.link.send(encode(action.message))
                case StartRead():
                    self._start(action)
                case CancelRead():
                    self._cancel_read(action.ticket)
                case Pin() | Release() | Settle():
                    orders.append(action)
        if orders:
            self._runner.transfer(orders)
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = [at for at in (self.lender.next_deadline(), self.borrower.next_deadline()) if at is not None]
        if due and not self._closed:
            self._timer = self._loop.call_at(min(due), self._due)

    def _due(self) -> None:
        now = self._loop.time()
        self._carry_out([*self.lender.tick(now), *self.borrower.tick(now)])

    def tick(self, now: float) -> None:
        """Each 0.25 s: greet owners, let go of those not needed, forget hand-overs whose lease has ended."""
        for node, source in list(self._sources.items()):
            owner = self._owner(node)
            if owner is None or owner.epoch != source.link.epoch:  # noqa: SIM114
                self._lost(node)
            elif not owner.ready and now - source.used > LINK_IDLE_S:
                self._lost(node)
            else:
                source.link.tick(now, False)
        if self._handed:
            self._handed = {key: lease for key, lease in self._handed.items() if lease in self.lender.leases}

    def raise_epoch(self, epoch: int) -> None:
        """This node's epoch has changed: what was lent under the old one is refused from now on."""
        self._carry_out(self.lender.raise_epoch(epoch, self._loop.time()))

    def engine_died(self) -> None:
        """Blocks and sequences are gone."""
        self._carry_out([*self.lender.engine_died(), *self.borrower.clear(self._loop.time())])

    async def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for source in self._sources.values():
            source.link.close()
            if source.meeting is not None:
                source.meeting.cancel()
        await asyncio.gather(*(s.meeting for s in self._sources.values() if s.meeting), return_exceptions=True)
        self._sources.clear()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._mover is not None:
            await self._mover.close()

    # What there is.

    def _made_mover(self) -> Mover | None:
        if self._mover is None and not self._closed:
            regions = (
                Region(self._memory[: self._tags], self.block_bytes),
                Region(self._memory[self._tags :], TAG.size),
            )
            try:
                self._mover = self._make_mover(regions, self.lender.holds)
                self._starting = self._loop.create_task(self._start_mover(self._mover))
            except TransferError as error:
                log.warning("KV blocks can be neither read nor given: %s", error)
        return self._mover

    async def _start_mover(self, mover: Mover) -> None:
        try:
            await mover.ready()
            self._describable = True
        except TransferError as error:
            log.warning("KV blocks cannot be given: %s", error)

    @property
    def bandwidth(self) -> float:
        """Bytes a second of reads so far; 0: none yet."""
        return 0.0 if self._mover is None else self._mover.bandwidth

    def report(self) -> dict[str, Any]:
        """Counters, those of what is under way zero when idle."""
        mover = self._mover
        return {
            "mover": None if mover is None else mover.name,
            "leases": self.lender.states(),
            "blocks_lent": self.lender.blocks,
            "refused": self.lender.refusals,
            "expired": self.lender.expired,
            "quarantined": self.lender.quarantined,
            "pulls": self.borrower.states(),
            "reads": 0 if mover is None else mover.reads,
            "bytes_read": 0 if mover is None else mover.bytes_read,
            "outcomes": dict(self.borrower.outcomes),
            "failures": {why: count for why, count in self.borrower.failures.items() if count},
            "blocks_filled": self.borrower.blocks,
            "bandwidth": self.bandwidth,
            "owners": {node: source.met for node, source in self._sources.items()},
        }
