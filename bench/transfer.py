"""KV blocks between two processes of this host: the movers against a plain NIXL loop; one JSON line a case.

Each round reads the same blocks by each way in turn; figures are medians.  ``plain`` is NIXL alone, as its examples
have it: one descriptor a block, post, look every 50 us until done, release; with the progress thread's pause as ours,
because NIXL's default spins on a core of each side and is slower here.  ``ratio`` is ours over plain, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from p2pdyn.core.types import Address
from p2pdyn.net.curve import Security, write_key_file
from p2pdyn.net.sockets import Sockets
from p2pdyn.transfer.base import Mover, Region
from p2pdyn.transfer.nixl import NixlMover
from p2pdyn.transfer.nixl_agent import DONE, Agent
from p2pdyn.transfer.tcp import TcpMover

TAG = 32
LOCAL = Address("127.0.0.1", 0)
CASES = (
    # name, bytes a block, blocks a read, reads, at once, scattered
    ("64 kB blocks, 256 MB, in a row", 2**16, 4096, 1, 1, False),
    ("64 kB blocks, 256 MB, scattered", 2**16, 4096, 1, 1, True),
    ("1 MB blocks, 256 MB, scattered", 2**20, 256, 1, 1, True),
    ("512 blocks of 64 kB, one read after the other", 2**16, 512, 8, 1, True),
    ("16 blocks of 64 kB, one read after the other", 2**16, 16, 64, 1, True),
    ("16 blocks of 64 kB, 16 reads at once", 2**16, 16, 64, 16, True),
)


def allocate(stride: int, blocks: int) -> tuple[Region, Region]:
    memory = memoryview(mmap.mmap(-1, blocks * (stride + TAG)))
    memory[:] = os.urandom(stride) * blocks + bytes(blocks * TAG)
    return Region(memory[: blocks * stride], stride), Region(memory[blocks * stride :], TAG)


class Movers:
    """All of them over the same memory."""

    def __init__(self, name: str, regions: Sequence[Region], key: Path) -> None:
        self.sockets = {"curve": Sockets(Security.load(key)), "open": Sockets(Security.insecure())}
        self.by_way: dict[str, Mover] = {
            f"tcp-{way}": TcpMover(sockets, LOCAL, regions, lambda block: True) for way, sockets in self.sockets.items()
        }
        self.by_way["nixl"] = NixlMover(name, regions, devices=("lo",))

    async def close(self) -> None:
        for mover in self.by_way.values():
            await mover.close()
        for sockets in self.sockets.values():
            sockets.close()


async def own(stride: int, blocks: int, key: Path) -> None:
    regions = allocate(stride, blocks)
    movers = Movers("owner-1", regions, key)
    await movers.by_way["nixl"].ready()
    plain = Agent("plain-owner", ("lo",))
    base = plain.register(regions[:1])[0]
    described = {way: mover.describe().hex() for way, mover in movers.by_way.items()}
    print(json.dumps({"movers": described, "base": base, "agent": plain.metadata().hex()}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await movers.close()


class Plain:
    """NIXL alone, in this thread."""

    def __init__(self, regions: Sequence[Region], owner: dict[str, Any]) -> None:
        self.agent = Agent("plain-reader", ("lo",))
        self.stride = regions[0].stride
        self.base = self.agent.register(regions[:1])[0]
        self.there = int(owner["base"])
        self.agent.load("plain-owner", bytes.fromhex(owner["agent"]))

    def read(self, remote: Sequence[int], local: Sequence[int]) -> None:
        rows = [self._rows(self.base, local), self._rows(self.there, remote)]
        handle, over = self.agent.begin("plain-owner", *rows)
        while not over:
            time.sleep(50e-6)
            over = self.agent.state(handle) == DONE
        self.agent.release(handle)

    def _rows(self, base: int, blocks: Sequence[int]) -> Any:
        import numpy as np

        rows = np.empty((len(blocks), 3), np.uint64)
        rows[:, 0] = base + np.array(blocks, np.uint64) * self.stride
        rows[:, 1], rows[:, 2] = self.stride, 0
        return rows


Read = tuple[Sequence[int], Sequence[int]]


async def read_all(mover: Mover, reads: Sequence[Read], at_once: int) -> None:
    for first in range(0, len(reads), at_once):
        batch = reads[first : first + at_once]
        all_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        errors: list[str] = []

        def over(
            error: str, errors: list[str] = errors, all_over: asyncio.Future[None] = all_over, n: int = len(batch)
        ) -> None:
            errors.append(error)
            if len(errors) == n:
                all_over.set_result(None)

        for remote, local in batch:
            mover.read("owner-1", remote, local, over)
        await all_over
        if any(errors):
            raise SystemExit(max(errors))


async def measure(case: tuple[Any, ...], rounds: int, scale: int, key: Path) -> dict[str, Any]:
    name, stride, size, number, at_once, scattered = case
    blocks = max(size * number, 4096 * 2**16 // stride) // scale
    size = min(size, blocks)
    command = [sys.executable, __file__, "--own", f"{stride},{blocks},{key}"]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: ASYNC220  # once a case
    assert owner.stdout is not None
    assert owner.stdin is not None
    regions = allocate(stride, blocks)
    movers = Movers("reader-1", regions, key)
    try:
        described = json.loads(await asyncio.get_running_loop().run_in_executor(None, owner.stdout.readline))
        for way, mover in movers.by_way.items():
            await mover.meet("owner-1", "127.0.0.1", bytes.fromhex(described["movers"][way]))
        plain = Plain(regions, described)

        async def read_plainly(reads: Sequence[Read]) -> None:
            for remote, local in reads:
                plain.read(remote, local)

        def by(mover: Mover) -> Callable[[Sequence[Read]], Awaitable[None]]:
            return lambda reads: read_all(mover, reads, at_once)

        ways = {"plain": read_plainly, **{way: by(mover) for way, mover in movers.by_way.items()}}
        rates = await compare(ways, stride, blocks, size, number // min(scale, number), scattered, rounds)
    finally:
        await movers.close()
        owner.stdin.close()
        owner.wait(10)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["nixl"], rates["plain"], strict=True))
    medians = {f"{way.replace('-', '_')}_gb_s": round(statistics.median(found), 3) for way, found in rates.items()}
    return {"bench": "transfer", "case": name, **medians, "ratio": round(ratio, 3), "rounds": rounds}


async def compare(
    ways: dict[str, Callable[[Sequence[Read]], Awaitable[None]]],
    stride: int,
    blocks: int,
    size: int,
    number: int,
    scattered: bool,
    rounds: int,
) -> dict[str, list[float]]:
    """Bytes a nanosecond of each round (the first, which touches the pages, not counted)."""
    rng = random.Random(1)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        reads: list[Read] = []
        for first in range(0, number * size, size):
            row = [block % blocks for block in range(first, first + size)]
            reads.append(
                (rng.sample(range(blocks), size), rng.sample(range(blocks), size)) if scattered else (row, row)
            )
        order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for way in order:
            start = time.perf_counter()
            await ways[way](reads)
            if turn:
                rates[way].append(number * size * stride / (time.perf_counter() - start) / 1e9)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the memory, two rounds")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--case", type=int, help="only this one, from 0")
    parser.add_argument("--own", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.own:
        stride, blocks, key = args.own.split(",", 2)
        uvloop.run(own(int(stride), int(blocks), Path(key)))
        return
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "key"
        write_key_file(key)
        for case in CASES if args.case is None else CASES[args.case : args.case + 1]:
            rounds, scale = (2, 16) if args.quick else (args.rounds, 1)
            print(json.dumps(uvloop.run(measure(case, rounds, scale, key))), flush=True)


if __name__ == "__main__":
    main()
