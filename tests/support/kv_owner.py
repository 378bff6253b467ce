"""A process that owns KV memory and lets it be read: ``python kv_owner.py '{"kind": "tcp", ...}'``.

Prints one JSON line with its description; then each line on stdin is an order: ``stats``, ``close``. Block i is filled
with :func:`content`.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import sys
from pathlib import Path
from typing import Any

import uvloop

from p2pdyn.core.types import Address
from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets
from p2pdyn.transfer.base import Region
from p2pdyn.transfer.choose import choose
from p2pdyn.transfer.tcp import TcpMover

TAG = 32


def content(block: int, size: int) -> bytes:
    """Bytes of a block, or of its tag: each block's are its own."""
    unit = block.to_bytes(8, "little") + (block * 2654435761 % 2**64).to_bytes(8, "little")
    return unit * (size // 16)


def allocate(blocks: int, stride: int) -> tuple[Region, Region]:
    memory = memoryview(mmap.mmap(-1, blocks * (stride + TAG)))
    return Region(memory[: blocks * stride], stride), Region(memory[blocks * stride :], TAG)


def fill(regions: tuple[Region, ...]) -> None:
    for memory, stride in regions:
        for block in range(len(memory) // stride):
            memory[block * stride : (block + 1) * stride] = content(block, stride)


async def main(options: dict[str, Any]) -> None:
    key = options.get("key")
    sockets = Sockets(Security.load(Path(key)) if key else Security.insecure())
    regions = allocate(options["blocks"], options["stride"])
    fill(regions)
    free = set(options.get("free", ()))
    mover = choose(
        options["kind"], sockets, options["name"], Address("127.0.0.1", 0), regions, lambda block: block not in free
    )
    await mover.ready()
    print(json.dumps({"description": mover.describe().hex()}), flush=True)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        if line.strip() == b"close":
            break
        owner = next((m.owner for m in getattr(mover, "movers", [mover]) if isinstance(m, TcpMover)), None)
        print(json.dumps({name: getattr(owner, name) for name in ("bytes_served", "refused", "malformed")}), flush=True)
    await mover.close()
    sockets.close()


if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1])))
