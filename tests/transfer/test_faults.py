"""Owners that die, freeze, are restarted or forgotten; reads that are cancelled: each is told once that it is over, and
nothing is written afterwards."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence

import pytest
from support.kv_reader import KINDS, LARGE, OwnerProcess, Reader, run

from p2pdyn.transfer.base import TransferError

Owners = Callable[..., OwnerProcess]
ALL = range(LARGE["blocks"])
MARK = b"\x7f"


def mark(reader: Reader, blocks: Sequence[int] = ALL) -> None:
    """So that a late write shows."""
    for memory, stride in reader.regions:
        for block in blocks:
            memory[block * stride : (block + 1) * stride] = MARK * stride


def marked(reader: Reader) -> bool:
    return all(memory == MARK * len(memory) for memory, _ in reader.regions)


@pytest.mark.parametrize("kind", KINDS)
def test_many_reads_are_under_way_at_once(owners: Owners, kind: str) -> None:
    owner = owners(kind)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        halves = [(range(i, i + 8), range(248 - i, 256 - i)) for i in range(0, 256, 8)]
        ends = [reader.start(owner.name, remote, local)[1] for remote, local in halves]
        assert reader.mover.reads == len(ends)
        assert await asyncio.gather(*ends) == [""] * len(ends)
        assert all(reader.has(remote, local) for remote, local in halves)
        assert reader.mover.reads == 0

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_read_is_told_once_and_writes_nothing_more(owners: Owners, kind: str) -> None:
    owner = owners(kind, **LARGE)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        ticket, over = reader.start(owner.name, ALL, ALL)
        reader.mover.cancel(ticket)
        reader.mover.cancel(ticket)
        assert await over == "it was cancelled"
        mark(reader)
        reader.mover.cancel(ticket)
        assert await reader.read(owner.name, [0], [0]) == ""
        assert reader.has([0], [0])
        mark(reader, [0])
        assert marked(reader)
        assert (reader.mover.reads, reader.mover.errors) == (0, 0)

    run(kind, body, **LARGE)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_from_a_forgotten_peer_end_with_an_error(owners: Owners, kind: str) -> None:
    owner = owners(kind, **LARGE)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        over = reader.start(owner.name, ALL, ALL)[1]
        reader.mover.forget(owner.name)
        assert await over == "the peer is gone"
        assert await reader.read(owner.name, [0], [0]) == "the peer is not known"
        reader.mover.forget("nobody-1")
        await reader.meet(owner)
        assert await reader.read(owner.name, ALL, ALL) == ""

    run(kind, body, **LARGE)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_from_a_killed_owner_end_with_an_error(owners: Owners, kind: str) -> None:
    owner, other = owners(kind, **LARGE), owners(kind, **LARGE)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        await reader.meet(other)
        amid = reader.start(owner.name, ALL, ALL)[1]
        owner.process.kill()
        owner.process.wait(10)
        assert await amid or reader.has(ALL, ALL)  # 64 MB are not read before a signal arrives, on most days
        assert await reader.read(owner.name, [0], [0])
        mark(reader)
        assert await reader.read(other.name, [0], [0]) == ""
        assert reader.mover.reads == 0
        assert 1 <= reader.mover.errors <= 2
        with pytest.raises(TransferError):
            await reader.meet(owner)

    run(kind, body, **LARGE)


def test_a_read_from_a_frozen_owner_is_over_when_it_is_cancelled(owners: Owners) -> None:
    owner = owners("tcp", **LARGE)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        owner.process.send_signal(signal.SIGSTOP)
        ticket, over = reader.start(owner.name, ALL, ALL)
        await asyncio.sleep(0.05)
        assert not over.done()
        reader.mover.cancel(ticket)
        assert await over == "it was cancelled"
        mark(reader)
        owner.process.send_signal(signal.SIGCONT)
        assert await reader.read(owner.name, [5], [7]) == ""  # behind the late parts of the first
        assert reader.has([5], [7])
        mark(reader, [7])
        assert marked(reader)

    run("tcp", body, **LARGE)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_frozen_owner_of_this_host_is_read_all_the_same(owners: Owners, kind: str) -> None:
    owner = owners(kind)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        owner.process.send_signal(signal.SIGSTOP)
        try:
            assert await reader.read(owner.name, range(256), range(256)) == ""
            assert reader.has(range(256), range(256))
        finally:
            owner.process.send_signal(signal.SIGCONT)

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_ends_what_is_under_way(owners: Owners, kind: str) -> None:
    owner = owners(kind, **LARGE)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        overs = [reader.start(owner.name, ALL, ALL)[1] for _ in range(3)]
        await reader.mover.close()
        assert [over.done() and over.result() != "" for over in overs] == [True] * 3
        await reader.mover.close()

    run(kind, body, **LARGE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_meeting_that_is_cancelled_leaves_nothing(owners: Owners, kind: str) -> None:
    owner = owners(kind)

    async def body(reader: Reader) -> None:
        meeting = asyncio.ensure_future(reader.meet(owner))
        await asyncio.sleep(0)
        meeting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await meeting
        await reader.meet(owner)
        assert await reader.read(owner.name, [0], [0]) == ""

    run(kind, body)


def test_an_owner_that_was_restarted_refuses(owners: Owners) -> None:
    old, new = owners("tcp", name="owner-1"), owners("tcp", name="owner-1")

    async def body(reader: Reader) -> None:
        old.description = old.with_port_of(new)
        with pytest.raises(TransferError, match="restarted"):
            await reader.meet(old)

    run("tcp", body)
