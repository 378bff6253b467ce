"""The reads of a NIXL agent, cut into slices: what the mover's thread does.

A posted READ cannot be taken back: NIXL's release and remove_remote_agent leave it writing into memory that has long
been given to others (docs/design/kv-transfer.md).  So a read is posted a slice at a time; a cancelled one posts no
more, and is over when its last slice is.  Between processes of one host, posting blocks while the kernel copies:
another reason for slices, and for a thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from p2pdyn.transfer.base import TransferError
from p2pdyn.transfer.nixl_agent import DONE
from p2pdyn.transfer.nixl_blocks import OwnBlocks, PeerBlocks, Slice

FLYING = 3
"""Slices posted at a time for each peer: one moves, one waits, one is being noticed."""

CANCELLED = "it was cancelled"


class Job:
    """One read: ``cut`` makes its slices from the peer's blocks. ``report(error)`` is told once."""

    __slots__ = ("cut", "error", "flying", "report", "slices")

    def __init__(self, cut: Callable[[PeerBlocks], Iterator[Slice]], report: Callable[[str], None]) -> None:
        self.cut = cut
        self.slices: Iterator[Slice] | None = iter(())
        """None: nothing more is posted."""
        self.report: Callable[[str], None] | None = report
        """None: told."""
        self.flying = 0
        self.error = ""

    def stop(self, why: str) -> None:
        self.slices = None
        self.error = self.error or why


class Source:
    """A peer that is read from."""

    def __init__(self, name: str, blocks: PeerBlocks) -> None:
        self.name = name
        self.blocks = blocks
        self.turns: deque[Job] = deque()
        """Jobs with slices to post."""
        self.flying: list[tuple[int, Job, Slice]] = []
        """(handle, job, slice) of each slice that is posted."""
        self.gone = ""
        """Why it is not read from any more."""


class Reads:
    """Belongs to the thread of its agent. ``step()`` posts and looks; nothing here waits."""

    def __init__(self, own: OwnBlocks) -> None:
        self._own = own
        self._agent = own.agent
        self._sources: dict[str, Source] = {}

    def busy(self) -> bool:
        """Is anything to be looked at?"""
        return any(source.flying or source.turns for source in self._sources.values())

    def load(self, peer: str, metadata: bytes, bases: Sequence[int], blocks: int) -> None:
        """Raises TransferError."""
        old = self._sources.get(peer)
        if old is not None and old.flying:
            raise TransferError("reads over its last connection are not over yet")
        if old is not None:
            self._give_up(old, "the peer was met again")
            self._drop(old)
        self._agent.unload(peer)
        self._agent.load(peer, metadata)
        self._sources[peer] = Source(peer, PeerBlocks(self._own, peer, bases, blocks))

    def add(self, peer: str, job: Job) -> None:
        source = self._sources.get(peer)
        if source is None or source.gone:
            job.stop(source.gone if source else "the peer is not known")
            _settle(job)
        elif job.slices is not None:
            job.slices = job.cut(source.blocks)
            source.turns.append(job)
        else:
            _settle(job)

    def cancel(self, job: Job) -> None:
        job.stop(CANCELLED)

    def forget(self, peer: str) -> None:
        source = self._sources.get(peer)
        if source is not None:
            self._give_up(source, "the peer is gone")

    def _give_up(self, source: Source, why: str) -> None:
        """Nothing more is posted there; when nothing is under way any more, its metadata goes."""
        source.gone = source.gone or why
        for job in (*source.turns, *[job for _, job, _ in source.flying]):
            job.stop(why)
            _settle(job)
        source.turns.clear()

    def abandon(self, why: str) -> None:
        """The agent is closed, and with it everything that was under way."""
        for source in self._sources.values():
            jobs = [job for _, job, _ in source.flying]
            source.flying.clear()
            for job in jobs:
                job.flying = 0
            for job in (*jobs, *source.turns):
                job.stop(why)
                _settle(job)
        self._sources.clear()

    def step(self) -> bool:
        """One slice posted for each peer that has room, then a look at all that are under way. Did anything move?"""
        moved = False
        for source in list(self._sources.values()):
            if source.turns and len(source.flying) < FLYING:
                moved = self._post(source) or moved
            moved = self._look(source) or moved
            if source.gone and not source.flying and not source.turns:
                self._drop(source)
                self._agent.unload(source.name)
        return moved

    def _drop(self, source: Source) -> None:
        """Nothing of it is under way. A list that NIXL has prepared may be let go of once only: so that goes together
        with being known here."""
        del self._sources[source.name]
        source.blocks.close()

    def _post(self, source: Source) -> bool:
        job = source.turns.popleft()
        piece = next(job.slices, None) if job.slices is not None else None
        if piece is None:
            job.slices = None
            _settle(job)
            return True
        try:
            handle, over = piece.post()
        except TransferError as error:
            _land(piece, arrived=False)
            job.stop(str(error))
            _settle(job)
            self._give_up(source, str(error))
            return True
        if piece.last:
            job.slices = None
        else:
            source.turns.append(job)
        if over:
            self._agent.release(handle)
            _land(piece, arrived=True)
            _settle(job)
        else:
            job.flying += 1
            source.flying.append((handle, job, piece))
        return True

    def _look(self, source: Source) -> bool:
        before = len(source.flying)
        still: list[tuple[int, Job, Slice]] = []
        trouble = ""
        for handle, job, piece in source.flying:
            arrived = True
            try:
                if self._agent.state(handle) != DONE:
                    still.append((handle, job, piece))
                    continue
            except TransferError as error:
                trouble, arrived = str(error), False
                job.stop(trouble)
            self._agent.release(handle)
            _land(piece, arrived=arrived)
            job.flying -= 1
            _settle(job)
        source.flying = still
        if trouble:
            self._give_up(source, trouble)
        return len(still) < before


def _settle(job: Job) -> None:
    """Tell that it is over, if it is."""
    if job.slices is None and not job.flying and job.report is not None:
        report, job.report = job.report, None
        report(job.error)


def _land(piece: Slice, *, arrived: bool) -> None:
    if piece.over is not None:
        piece.over(arrived)
