"""Three times the load that the workers can take, then as much as before: what clients see, and how soon it is over.

    python bench/overload.py             (10 s before, 20 s at 3 x capacity, up to 30 s after; two `sim` workers)
    python bench/overload.py --clients 50 --quick

Requests come at random times (Poisson), whatever became of earlier ones, from ``--clients`` loopback addresses in turn;
one more client of its own, the modest one, streams a request each 0.25 s all the time. Capacity follows from the
workers' arguments. Recovered is when the median TTFT of a second is, and stays, within 10 % (and 5 ms) of that before.
One JSON line; exit 1 if anything but 200, 429 and 503 came back, a 429 or 503 had no Retry-After, or a stream broke.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import uvloop
from support.nodes import Cluster

ITL_MS, TOKENS, WORKERS = 10, 20, 2
PREFILL_S = 0.005
"""Of a prompt, at the workers' speed: about what a step lasts longer for it."""
ANSWER_S = 90.0
MODEST = "127.0.9.9"


@dataclass
class Asked:
    """``at`` is in seconds since the start; ``ttft_s`` is None where no token came."""

    at: float
    client: str
    status: int = 0
    ttft_s: float | None = None
    retry_after: int | None = None
    broken: str = ""


@dataclass
class Load:
    host: str
    port: int
    began: float = field(default_factory=time.monotonic)
    asked: list[Asked] = field(default_factory=list)
    number: int = 0

    async def ask(self, client: str) -> None:
        """One streamed request on a connection of its own."""
        self.number += 1
        one = Asked(time.monotonic() - self.began, client)
        self.asked.append(one)
        body = json.dumps(
            {
                "model": "sim",
                "messages": [{"role": "user", "content": f"{self.number} {random.random()}"}],
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._exchange(one, body)
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as error:
            one.broken = repr(error)

    async def _exchange(self, one: Asked, body: bytes) -> None:
        start = time.monotonic()
        reader, writer = await asyncio.open_connection(self.host, self.port, local_addr=(one.client, 0))
        try:
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            one.status = int(head.split(b" ", 2)[1])
            if one.status != 200:
                given = head.lower().partition(b"retry-after: ")[2].partition(b"\r\n")[0]
                one.retry_after = int(given) if given else None
                json.loads(await reader.read())["error"]["message"]
                return
            await reader.readuntil(b"data: ")
            one.ttft_s = time.monotonic() - start
            rest = await reader.read()
            if b"data: [DONE]" not in rest or b'"error"' in rest:
                one.broken = rest[-200:].decode(errors="replace")
        finally:
            writer.close()

    async def flood(self, rate: float, seconds: float, clients: Iterator[str]) -> None:
        """Starts ``rate`` requests a second on average, and waits for none of them."""
        due, end = time.monotonic(), time.monotonic() + seconds
        while due < end:
            due += random.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._start(next(clients))

    async def modest(self, every_s: float = 0.25) -> None:
        while True:
            self._start(MODEST)
            await asyncio.sleep(every_s)

    def _start(self, client: str) -> None:
        task = asyncio.ensure_future(self.ask(client))
        _running.add(task)
        task.add_done_callback(_running.discard)


_running: set[asyncio.Task[None]] = set()


def addresses(count: int) -> Iterator[str]:
    """Loopback addresses in turn, without end."""
    while True:
        for number in range(count):
            yield f"127.0.{1 + number // 250}.{1 + number % 250}"


async def drive(load: Load, arguments: argparse.Namespace, capacity: float) -> tuple[float, float]:
    """When the overload began and ended."""
    clients = addresses(arguments.clients)
    modest = asyncio.ensure_future(load.modest())
    await load.flood(arguments.before * capacity, arguments.calm, clients)
    began = time.monotonic() - load.began
    await load.flood(arguments.times * capacity, arguments.overload, clients)
    ended = time.monotonic() - load.began
    await load.flood(arguments.before * capacity, arguments.after, clients)
    modest.cancel()
    if _running:
        await asyncio.wait(_running, timeout=ANSWER_S)
    return began, ended


def median_ms(asked: list[Asked], since: float, until: float) -> float | None:
    times = [one.ttft_s for one in asked if since <= one.at < until and one.ttft_s is not None]
    return round(statistics.median(times) * 1e3, 1) if times else None


def recovery_s(asked: list[Asked], ended: float, last: float, before_ms: float) -> float | None:
    """Seconds from the end of the overload until each later second's median is near the one before; None: never."""
    limit, recovered, at = max(1.1 * before_ms, before_ms + 5), None, ended
    while at + 1.0 <= last:
        median = median_ms(asked, at, at + 1.0)
        if median is None or median > limit:
            recovered = None
        elif recovered is None:
            recovered = at - ended
        at += 0.25
    return None if recovered is None else round(recovered, 2)


def figures(load: Load, began: float, ended: float, capacity: float) -> dict[str, Any]:
    crowd = [one for one in load.asked if one.client != MODEST]
    modest = [one for one in load.asked if one.client == MODEST]
    last = max(one.at for one in load.asked)
    before = median_ms(crowd, began / 3, began) or 0.0
    during = [one for one in crowd if began <= one.at < ended]
    retries = [one.retry_after for one in load.asked if one.status in (429, 503) and one.retry_after is not None]
    bad = [
        one
        for one in load.asked
        if one.broken or one.status not in (200, 429, 503) or (one.status != 200 and one.retry_after is None)
    ]
    slowest = [one.ttft_s for one in modest if began <= one.at < ended and one.ttft_s is not None]
    return {
        "bench": "overload",
        "capacity_req_s": round(capacity),
        "requests": len(load.asked),
        "statuses": {str(status): count for status, count in sorted(Counter(one.status for one in load.asked).items())},
        "ttft_p50_ms": {"before": before, "overload": median_ms(crowd, began, ended)},
        "served_req_s_in_overload": round(sum(one.status == 200 for one in during) / (ended - began), 1),
        "recovery_s": recovery_s(crowd, ended, last, before),
        "retry_after_s": [min(retries), max(retries)] if retries else None,
        "modest": {
            "statuses": dict(Counter(str(one.status) for one in modest)),
            "ttft_p50_ms_before": median_ms(modest, 0.0, began),
            "ttft_p50_ms_overload": median_ms(modest, began, ended),
            "ttft_max_ms_overload": round(max(slowest) * 1e3) if slowest else None,
        },
        "bad": [f"{one.status} {one.broken}" for one in bad[:5]],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=4, help="requests that a worker runs at a time")
    parser.add_argument("--times", type=float, default=3.0, help="capacity, in the overload")
    parser.add_argument("--before", type=float, default=0.5, help="capacity, before and after")
    parser.add_argument("--calm", type=float, default=10.0, help="seconds before")
    parser.add_argument("--overload", type=float, default=20.0, help="seconds")
    parser.add_argument("--after", type=float, default=30.0, help="seconds")
    parser.add_argument("--clients", type=int, default=1, help="addresses that the load comes from")
    parser.add_argument("--quick", action="store_true", help="5, 5 and 10 s")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.calm, arguments.overload, arguments.after = 5.0, 5.0, 10.0
    return arguments


def main() -> int:
    arguments = parse()
    capacity = WORKERS * arguments.slots / (TOKENS * ITL_MS / 1e3 + PREFILL_S)
    with tempfile.TemporaryDirectory(prefix="p2pdyn-bench-") as folder, Cluster(Path(folder)) as cluster:
        frontend = cluster.frontend("frontend")
        engine = ("--", "--max-num-seqs", str(arguments.slots), "--itl-ms", str(ITL_MS))
        for number in range(WORKERS):
            cluster.worker(f"worker{number}", *engine, seeds=[frontend])
        where = urlsplit(frontend.url)
        load = Load(where.hostname or "", where.port or 0)

        async def all_of_it() -> tuple[float, float]:
            while not (load.asked and load.asked[-1].status == 200):
                await load.ask(MODEST)
            load.began = time.monotonic()
            load.asked.clear()
            return await drive(load, arguments, capacity)

        began, ended = uvloop.run(all_of_it())
    found = figures(load, began, ended, capacity)
    print(json.dumps(found))
    return int(bool(found["bad"]))


if __name__ == "__main__":
    sys.exit(main())
