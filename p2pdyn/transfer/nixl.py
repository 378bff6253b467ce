"""KV blocks over NIXL: one-sided READs, the owner's process takes no part.

All of NIXL runs in one thread of ours, because its calls take long: posting a read copies it where both processes are
of one host, and looking at one over a network goes on for as long as bytes come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from threading import get_ident

from p2pdyn.transfer.base import (
    MEET_S,
    Done,
    Geometry,
    Rate,
    Region,
    TransferError,
    dump_description,
    load_description,
    new_life,
)
from p2pdyn.transfer.nixl_agent import has_rdma, machine
from p2pdyn.transfer.nixl_blocks import SAMPLE, PeerBlocks
from p2pdyn.transfer.nixl_reads import CANCELLED, Job, Reads
from p2pdyn.transfer.nixl_thread import NixlThread
from p2pdyn.wire.transfer import Description

START_S = 30.0
"""For NIXL to be loaded and to come up: 0.2 to 1 s on an idle host."""
SHORT = 2 * 2**20
"""Bytes: half a millisecond of copying."""
FIRST = 64
"""Bytes of the read that sets the connection up."""


class NixlMover:
    """``peer`` is the name that others know us by; ``devices``: network devices for UCX, none: all.  ``emulated``: read
    also from peers whose memory cannot be reached directly. UCX then emulates READs over TCP, a read from a frozen peer
    cannot be ended, and a reader that dies can take the owner's process with it (docs/design/kv-transfer.md).

    Raises TransferError if the regions do not fit each other. The agent comes up in the background; :meth:`describe`
    waits for it, and raises TransferError if it does not come.
    """

    name = "nixl"

    def __init__(
        self, peer: str, regions: Sequence[Region], *, devices: Sequence[str] = (), emulated: bool = False
    ) -> None:
        self._loop, self._loop_thread = asyncio.get_running_loop(), get_ident()
        self.geometry = Geometry.of(regions)
        self._life = new_life()
        self._emulated = emulated
        self._jobs: dict[int, Job] = {}
        self._sources: dict[str, Description] = {}
        self._tickets = 0
        self._rate = Rate()
        self.bytes_read = 0
        self.errors = 0
        self._up, self._ended = asyncio.Event(), asyncio.Event()
        self._closed = False
        self._read_in_turn = False
        self._told: deque[Callable[[], object]] = deque()
        """By the thread, for the loop."""
        self._woken = False
        self._thread = NixlThread(
            *(peer, tuple(regions), tuple(devices)),
            on_up=partial(self._on_loop, self._up.set),
            on_end=partial(self._on_loop, self._ended.set),
        )
        self._thread.start()

    def _on_loop(self, callback: Callable[..., object], *args: object) -> None:
        """From any thread. One wake-up serves all that has been told until it is heard."""
        if get_ident() == self._loop_thread:
            self._loop.call_soon(callback, *args)
            return
        self._told.append(partial(callback, *args))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                self._loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        self._woken = False  # before looking: what comes now wakes us again
        for _ in range(len(self._told)):
            self._loop.call_soon(self._told.popleft())

    @property
    def reads(self) -> int:
        return len(self._jobs)

    @property
    def bandwidth(self) -> float:
        return self._rate.value

    async def ready(self) -> None:
        await self._up.wait()
        if self._thread.trouble:
            raise TransferError(self._thread.trouble)

    def describe(self) -> bytes:
        thread = self._thread
        if not thread.up.wait(START_S) or thread.trouble:
            raise TransferError(thread.trouble or f"NIXL did not come up within {START_S:g} s")
        return dump_description(
            Description(
                *(self.name, self._life, *self.geometry),
                machine=machine(),
                rdma=has_rdma(),
                bases=tuple(thread.bases),
                agent=thread.metadata,
            )
        )

    async def meet(self, peer: str, host: str, description: bytes) -> None:
        known = load_description(description, self.name, self.geometry.strides)
        if len(known.bases) != len(known.strides):
            raise TransferError("its description of KV memory has not one address a region")
        if not (self._emulated or _direct(known)):
            raise TransferError(
                "its memory cannot be reached directly: it is on another host, and one of both lacks RDMA"
            )
        self.forget(peer)
        try:
            async with asyncio.timeout(MEET_S):
                await self._up.wait()
                await self._load(peer, known)
                for size in (FIRST, SAMPLE):
                    await self._warm_up(peer, known, size)
        except BaseException as error:
            self._thread.order(lambda reads: reads.forget(peer))
            if isinstance(error, TimeoutError):
                raise TransferError(f"NIXL cannot read its KV blocks within {MEET_S:g} s") from None
            raise
        self._sources[peer] = known

    async def _load(self, peer: str, known: Description) -> None:
        loaded: asyncio.Future[str] = self._loop.create_future()

        def load(reads: Reads) -> None:
            trouble = ""
            try:
                reads.load(peer, known.agent, known.bases, known.blocks)
            except TransferError as error:
                trouble = str(error)
            self._on_loop(_resolve, loaded, trouble)

        if self._thread.trouble:
            raise TransferError(self._thread.trouble)
        self._thread.order(load)
        if trouble := await loaded:
            raise TransferError(trouble)

    async def _warm_up(self, peer: str, known: Description, size: int) -> None:
        over: asyncio.Future[str] = self._loop.create_future()
        size = min(size, known.blocks * known.strides[0])
        job = Job(partial(PeerBlocks.sample, size=size), partial(self._on_loop, _resolve, over))
        self._begin()
        self._thread.order(lambda reads: reads.add(peer, job))
        try:
            if error := await over:
                raise TransferError(error)
        finally:
            self._thread.order(lambda reads: reads.cancel(job))
        if not self._jobs and size > FIRST:
            self._rate.add(size, self._loop.time())

    def forget(self, peer: str) -> None:
        if self._sources.pop(peer, None) is not None:
            self._thread.order(lambda reads: reads.forget(peer))

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], done: Done) -> int:
        self._tickets += 1
        ticket, known = self._tickets, self._sources.get(peer)
        trouble = self.geometry.trouble(remote, local, known.blocks) if known else "the peer is not known"
        over = partial(self._over, ticket, done, len(remote) * sum(self.geometry.strides))
        self._begin()
        if known is None or trouble:
            self._jobs[ticket] = Job(lambda _: iter(()), over)
            self._loop.call_soon(over, trouble)
            return ticket
        cut = partial(PeerBlocks.cut, remote=tuple(remote), local=tuple(local))
        job = self._jobs[ticket] = Job(cut, partial(self._on_loop, over))
        if not self._read_now(peer, known, job, len(remote)):
            self._thread.order(lambda reads: reads.add(peer, job))
        return ticket

    def _read_now(self, peer: str, known: Description, job: Job, blocks: int) -> bool:
        """A short read on this host is over sooner than the thread has woken: at most one in a turn of the loop."""
        if self._read_in_turn or known.machine != machine() or blocks * sum(known.strides) > SHORT:
            return False
        self._read_in_turn = True
        self._loop.call_soon(self._next_turn)
        return self._thread.add_now(peer, job)

    def _next_turn(self) -> None:
        self._read_in_turn = False

    def _begin(self) -> None:
        if not self._jobs:
            self._rate.begin(self._loop.time())

    def _over(self, ticket: int, done: Done, size: int, error: str) -> None:
        del self._jobs[ticket]
        if error:
            self.errors += error != CANCELLED
        else:
            self.bytes_read += size
            self._rate.add(size, self._loop.time())
        done(error)

    def cancel(self, ticket: int) -> None:
        job = self._jobs.get(ticket)
        if job is not None:
            self._thread.order(lambda reads: reads.cancel(job))

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            for ticket in list(self._jobs):
                self.cancel(ticket)
            self._sources.clear()
            self._thread.order(None)
        await self._ended.wait()
        self._thread.join()


def _direct(known: Description) -> bool:
    """Can the kernel, or a network card, read there without the peer's help?"""
    return (known.machine != 0 and known.machine == machine()) or (known.rdma and has_rdma())


def _resolve(future: asyncio.Future[str], error: str) -> None:
    if not future.done():
        future.set_result(error)
