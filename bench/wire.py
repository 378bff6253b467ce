"""The wire alone: encoding and decoding of the hot messages, and the request link's throughput; one JSON line each.

Rates of the codec are also given against bare msgpack on the same content (`ratio`), which checks nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import uvloop

from p2pdyn.core.types import Address
from p2pdyn.net.curve import Security, write_key_file
from p2pdyn.net.sockets import Sockets
from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.requests import Delta, Generate, Tokens
from p2pdyn.wire.schema import REQUESTS

PROMPT = struct.pack("<512I", *range(1000, 1512))
STEP = encode(Tokens(7, tuple(Delta(rid, 0, 5, (1234,)) for rid in range(32))))
WINDOW = 256
"""Messages that the receiver lets be under way: it asks for as many again when half of them have come."""


def rate(call: Callable[[], object], seconds: float) -> float:
    """Calls a second: the median of five stretches."""
    rates = []
    for _ in range(5):
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds / 5:
            for _ in range(20):
                call()
            count += 20
        rates.append(count / spent)
    return statistics.median(rates)


def codec(seconds: float) -> None:
    messages = {
        "tokens-1": (Tokens(7, (Delta(1, 0, 5, (1234,)),)), 1),
        "tokens-32": (Tokens(7, tuple(Delta(rid, 0, 5, (1234,)) for rid in range(32))), 32),
        "generate-512": (Generate(1, 0, 7, "tiny", 512, PROMPT, b""), 1),
    }
    for name, (message, items) in messages.items():
        data = encode(message)
        if decode(REQUESTS, data) != message:
            raise SystemExit(f"{name}: decoding does not give back what was encoded")
        plain = _plain(message)
        packed = msgpack.packb(plain)
        pack, unpack = rate(partial(encode, message), seconds), rate(partial(decode, REQUESTS, data), seconds)
        bare_pack = rate(partial(msgpack.packb, plain), seconds)
        bare_unpack = rate(partial(msgpack.unpackb, packed, use_list=False), seconds)
        _print(
            {
                "bench": "codec",
                "message": name,
                "bytes": len(data),
                "encode_items_s": round(pack * items),
                "decode_items_s": round(unpack * items),
                "ratio": {"encode": round(pack / bare_pack, 2), "decode": round(unpack / bare_unpack, 2)},
            }
        )


def _plain(message: object) -> list[Any]:
    if isinstance(message, Tokens):
        return [5, message.epoch, [tuple(delta) for delta in message.deltas]]
    return [3, *(getattr(message, name) for name in Generate.__slots__)]


def link(seconds: float, *, curve: bool) -> None:
    """Messages a second from a ROUTER in one process to a DEALER in another, each on its own loop, through Sockets."""
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "cluster.key" if curve else None
        if key:
            write_key_file(key)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        server = context.Process(target=serve, args=(key, theirs), daemon=True)
        server.start()
        if not ours.poll(20):
            raise SystemExit("the ROUTER did not bind within 20 s")
        try:
            count, spent = uvloop.run(_receive(_security(key), ours.recv(), seconds))
        finally:
            server.terminate()
            server.join(10)
    _print({"bench": "link", "curve": curve, "message_bytes": len(STEP), "messages_s": round(count / spent)})


def _security(key: Path | None) -> Security:
    return Security.load(key) if key else Security.insecure()


def serve(key: Path | None, bound: Connection) -> None:
    """The child: a ROUTER that answers each message with half a window of steps, until the process is ended."""

    async def run() -> None:
        sockets = Sockets(_security(key))

        def receive(frames: list[bytes]) -> None:
            for _ in range(WINDOW // 2):
                router.send([frames[0], STEP])

        router = sockets.router([Address("127.0.0.1", 0)], receive, max_size=1 << 20)
        bound.send(router.addresses[0])
        await asyncio.Event().wait()

    uvloop.run(run())


async def _receive(security: Security, address: Address, seconds: float) -> tuple[int, float]:
    sockets = Sockets(security)
    count = 0
    up = asyncio.Event()

    def receive(frames: list[bytes]) -> None:
        nonlocal count
        count += 1
        if count % (WINDOW // 2) == 0:
            dealer.send([b"more"])

    dealer = sockets.dealer(address, receive, max_size=1 << 20, on_up=up.set)
    await asyncio.wait_for(up.wait(), 10)
    dealer.send([b"more"])
    dealer.send([b"more"])
    await asyncio.sleep(seconds / 5)
    first, start = count, time.perf_counter()
    await asyncio.sleep(seconds)
    result = count - first, time.perf_counter() - start
    sockets.close()
    if not result[0]:
        raise SystemExit("no message came over the link")
    return result


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of a second each: proves that it runs")
    seconds = 0.1 if parser.parse_args().quick else 2.0
    codec(seconds)
    for curve in (False, True):
        link(seconds, curve=curve)


if __name__ == "__main__":
    main()
