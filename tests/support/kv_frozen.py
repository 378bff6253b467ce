"""Reads over NIXL with UCX's emulation over TCP from an owner that is frozen: ``UCX_TLS=tcp python kv_frozen.py``.

A process of its own, because UCX reads its environment. Prints what happened, one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import signal

import uvloop

from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets
from p2pdyn.transfer.choose import choose
from support.kv_owner import allocate
from support.kv_reader import LOCAL, OwnerProcess

BLOCKS, STRIDE = 64, 2**20
STILL_S = 0.5


async def main(owner: OwnerProcess) -> dict[str, object]:
    sockets, regions = Sockets(Security.insecure()), allocate(BLOCKS, STRIDE)
    mover = choose("nixl", sockets, "reader-1", LOCAL, regions, lambda block: True)
    over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    await mover.meet(owner.name, "127.0.0.1", owner.description)
    owner.process.send_signal(signal.SIGSTOP)
    ticket = mover.read(owner.name, range(BLOCKS), range(BLOCKS), over.set_result)
    await asyncio.sleep(STILL_S / 10)  # the first slices are posted
    mover.cancel(ticket)
    mover.forget(owner.name)
    await asyncio.sleep(STILL_S)
    frozen = {"over": over.done(), "reads": mover.reads}
    owner.process.send_signal(signal.SIGCONT)
    error = await asyncio.wait_for(over, 20)
    written = sum(bytes(regions[0].memory[at : at + 16]) != bytes(16) for at in range(0, BLOCKS * STRIDE, STRIDE))
    for memory, _ in regions:
        memory[:] = b"\x7f" * len(memory)
    await mover.meet(owner.name, "127.0.0.1", owner.description)
    again: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    mover.read(owner.name, [0], [0], again.set_result)
    outcome = {"frozen": frozen, "error": error, "written": written, "again": await again, "reads": mover.reads}
    intact = all(memory[stride:] == b"\x7f" * (len(memory) - stride) for memory, stride in regions)
    await mover.close()
    sockets.close()
    return {**outcome, "intact": intact}


if __name__ == "__main__":
    process = OwnerProcess(kind="nixl", name="owner-1", blocks=BLOCKS, stride=STRIDE)
    try:
        print(json.dumps(uvloop.run(main(process))))
    finally:
        process.end()
