"""What every mover promises, against a second process."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.kv_reader import BLOCKS, KINDS, STRIDE, OwnerProcess, Reader, run

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
