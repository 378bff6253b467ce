"""What every mover promises, against a second process."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.kv_reader import BLOCKS, KINDS, STRIDE, OwnerProcess, Reader, run

from p2pdyn.transfer.base import TransferError

Owners = Callable[..., OwnerProcess]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_their_tags_arrive(owners: Owners, kind: str) -> None:
    owner, rng = owners(kind), random.Random(1)
    scattered = rng.sample(range(BLOCKS), 100), rng.sample(range(BLOCKS), 100)
    contiguous = range(10, 210), range(40, 240)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        assert reader.empty(range(BLOCKS)), "the warm-up wrote into blocks"
        for remote, local in (contiguous, scattered, ([BLOCKS - 1], [0])):
            assert await reader.read(owner.name, remote, local) == ""
            assert reader.has(remote, local)
        assert reader.mover.bytes_read == 301 * (STRIDE + 32)
        assert reader.mover.bandwidth > 0
        assert (reader.mover.reads, reader.mover.errors) == (0, 0)

    run(kind, body)
    assert owner.end() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [16, 3 * 2**20])
def test_small_and_large_blocks(owners: Owners, kind: str, stride: int) -> None:
    owner = owners(kind, blocks=20, stride=stride)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        remote, local = [0, 1, 2, 19, 7], [4, 5, 6, 0, 19]
        assert await reader.read(owner.name, remote, local) == ""
        assert reader.has(remote, local)
        assert reader.empty(sorted({*range(20)} - {*local}))

    run(kind, body, blocks=20, stride=stride)


@pytest.mark.parametrize("kind", KINDS)
def test_owners_may_have_more_or_fewer_blocks(owners: Owners, kind: str) -> None:
    owner = owners(kind, blocks=40)

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        assert await reader.read(owner.name, [39], [200]) == ""
        assert reader.has([39], [200])
        assert "do not exist" in await reader.read(owner.name, [40], [0])

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_is_told_like_any_error(owners: Owners, kind: str) -> None:
    owner = owners(kind)

    async def body(reader: Reader) -> None:
        assert await reader.read("nobody-1", [0], [0]) == "the peer is not known"
        await reader.meet(owner)
        for remote, local in (([], []), ([0, 1], [0]), ([0], [BLOCKS]), ([-1], [0]), ([0], [-1]), ([2**40], [0])):
            assert await reader.read(owner.name, remote, local) != ""
        assert reader.empty(range(BLOCKS))
        assert reader.mover.reads == 0
        reader.mover.cancel(4711)

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_other_geometry_and_garbage_are_refused(owners: Owners, kind: str) -> None:
    owner = owners(kind, stride=32768)

    async def body(reader: Reader) -> None:
        with pytest.raises(TransferError, match=r"32768\+32 bytes, ours 65536\+32"):
            await reader.meet(owner)
        for garbage in (b"", b"\x01\xc0", b"x" * 1000, owner.description[:-1], owner.description + b"\0"):
            with pytest.raises(TransferError):
                await reader.mover.meet(owner.name, "127.0.0.1", garbage)

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_can_be_met_again(owners: Owners, kind: str) -> None:
    owner = owners(kind)

    async def body(reader: Reader) -> None:
        for _ in range(3):
            await reader.meet(owner)
            assert await reader.read(owner.name, [3], [4]) == ""

    run(kind, body)
