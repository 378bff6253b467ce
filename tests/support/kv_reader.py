"""A second process that owns KV memory, and a mover here that reads from it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import uvloop

from p2pdyn.core.types import Address
from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets
from p2pdyn.transfer.base import Mover
from p2pdyn.transfer.choose import choose
from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.schema import TRANSFER
from p2pdyn.wire.transfer import Description
from support.kv_owner import allocate, content

TESTS = Path(__file__).parents[1]
BLOCKS, STRIDE = 256, 65536
LARGE = {"blocks": 64, "stride": 2**20}
"""Long enough to be caught in the middle."""
LOCAL = Address("127.0.0.1", 0)

needs_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL is not installed")
KINDS = ["tcp", pytest.param("nixl", marks=needs_nixl)]


class OwnerProcess:
    """Serves memory until it is closed, or killed."""

    def __init__(self, **options: Any) -> None:
        self.name = options["name"]
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "kv_owner.py"), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
        assert self.process.stdout is not None
        self.description = bytes.fromhex(json.loads(self.process.stdout.readline())["description"])

    def with_port_of(self, other: OwnerProcess) -> bytes:
        """The description that this one would have at the other's port."""
        ours, theirs = (decode(TRANSFER, owner.description) for owner in (self, other))
        assert isinstance(ours, Description)
        assert isinstance(theirs, Description)
        return encode(replace(ours, port=theirs.port))

    def stats(self) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"stats\n")
        self.process.stdin.flush()
        found: dict[str, int] = json.loads(self.process.stdout.readline())
        return found

    def end(self) -> int:
        """Its exit status; 0 if it closed in order."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)
        finally:
            self.process.stdout.close()


class Reader:
    """A mover with memory of its own, in this process."""

    def __init__(self, mover: Mover, regions: Any) -> None:
        self.mover = mover
        self.regions = regions
        self.ends: list[tuple[int, str]] = []

    async def meet(self, owner: OwnerProcess) -> None:
        await self.mover.meet(owner.name, "127.0.0.1", owner.description)

    def start(self, peer: str, remote: Sequence[int], local: Sequence[int]) -> tuple[int, asyncio.Future[str]]:
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return self.mover.read(peer, remote, local, over.set_result), over

    async def read(self, peer: str, remote: Sequence[int], local: Sequence[int]) -> str:
        return await self.start(peer, remote, local)[1]

    def has(self, remote: Sequence[int], local: Sequence[int]) -> bool:
        """Is the content of each remote block, and its tag, here?"""
        return all(
            memory[here * stride : (here + 1) * stride] == content(there, stride)
            for memory, stride in self.regions
            for there, here in zip(remote, local, strict=True)
        )

    def empty(self, blocks: Sequence[int]) -> bool:
        return all(
            memory[block * stride : (block + 1) * stride] == bytes(stride)
            for memory, stride in self.regions
            for block in blocks
        )


def run(
    kind: str,
    body: Callable[[Reader], Awaitable[None]],
    *,
    blocks: int = BLOCKS,
    stride: int = STRIDE,
    security: Security | None = None,
) -> None:
    """``body`` on a uvloop with a reader; everything is closed afterwards."""

    async def main() -> None:
        sockets = Sockets(security or Security.insecure())
        try:
            regions = allocate(blocks, stride)
            mover = choose(kind, sockets, "reader-1", LOCAL, regions, lambda block: True)
            try:
                async with asyncio.timeout(40):
                    await body(Reader(mover, regions))
            finally:
                await mover.close()
        finally:
            sockets.close()

    uvloop.run(main())
