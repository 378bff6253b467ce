"""Resident memory of a frontend and two `sim` workers over many requests, one JSON line at the end.

    python bench/memory_growth.py                     (200,000 requests; --requests 20000 takes half a minute)
    python bench/memory_growth.py --max-growth 5      (exit 1 if the frontend or a worker has grown by more, in %)

All prompts are distinct. Of the requests 45 % are streamed, 35 % answered whole, 10 % left by their client in the
middle of the answer, 10 % refused: JSON that does not parse, a field out of range, a model or path that is not there.
Growth is the mean of the last tenth of the samples against that of those around the end of the warm-up; the slope is a
least-squares line through all samples after it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import model_dir
import sides
import uvloop

ANSWER_S = 60.0
SAMPLE_S = 0.5
KINDS = {"streamed": 45, "whole": 35, "aborted": 10, "refused": 10}
REFUSALS = (
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [', 400),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_p": 7}', 400),
    ("/v1/completions", b'{"model": "no-such-model-%d", "prompt": "x"}', 404),
    ("/v1/no/such/path/%d", b"{}", 404),
)
VOCABULARY = model_dir.words()


@dataclass
class Run:
    """What the clients share. ``samples`` are (requests done, resident kB of each process, the frontend first)."""

    host: str
    port: int
    pids: list[int]
    requests: int
    until: float
    started: int = 0
    done: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[int, list[int]]] = field(default_factory=list)

    async def sample(self) -> None:
        while True:
            self.samples.append((self.done, [resident_kb(pid) for pid in self.pids]))
            await asyncio.sleep(SAMPLE_S)


class Connection:
    """One client at a time; opens anew whenever the endpoint has closed it or the client has left."""

    def __init__(self, run: Run, rng: random.Random) -> None:
        self.run = run
        self.rng = rng
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def go(self) -> None:
        run = self.run
        while run.started < run.requests and time.monotonic() < run.until:
            run.started += 1
            kind = self.rng.choices(list(KINDS), KINDS.values())[0]  # type: ignore[arg-type]
            status = await asyncio.wait_for(self.ask(kind, run.started), ANSWER_S)
            run.outcomes[f"{kind} {status}"] += 1
            run.done += 1
        await self.close()

    async def ask(self, kind: str, number: int) -> int:
        path, body, expected = self.request(kind, number)
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.run.host, self.run.port)
        reader, writer = self.streams
        writer.write(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (path.encode(), len(body), body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status != expected:
            raise SystemExit(f"request {number} ({kind}) was answered {status}: {head!r}")
        if kind == "aborted":
            await self.close()
        elif b"chunked" in head:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            if b"connection: close" in head.lower():
                await self.close()
        return status

    def request(self, kind: str, number: int) -> tuple[str, bytes, int]:
        if kind == "refused":
            path, body, status = self.rng.choice(REFUSALS)
            return path.replace("%d", str(number)), body.replace(b"%d", b"%d" % number), status
        words = model_dir.text(self.rng, VOCABULARY, self.rng.randrange(3, 15))
        asked = {
            "model": sides.MODEL,
            "messages": [{"role": "user", "content": f"{number:08d} {words}"}],
            "max_tokens": 1000 if kind == "aborted" else self.rng.randrange(1, 8),
            "ignore_eos": True,
            "stream": kind != "whole",
        }
        return "/v1/chat/completions", json.dumps(asked).encode(), 200

    async def close(self) -> None:
        if self.streams is not None:
            writer, self.streams = self.streams[1], None
            writer.close()


def resident_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise SystemExit(f"process {pid} has ended")


async def load(run: Run, connections: int, seed: int) -> None:
    sampling = asyncio.ensure_future(run.sample())
    await asyncio.gather(*(Connection(run, random.Random(f"{seed}/{i}")).go() for i in range(connections)))
    sampling.cancel()
    run.samples.append((run.done, [resident_kb(pid) for pid in run.pids]))


def figures(samples: list[tuple[int, list[int]]], position: int, warm_up: int) -> dict[str, float]:
    """``position`` of the process in the samples."""
    after = [(done, sizes[position]) for done, sizes in samples if done >= warm_up]
    tenth = max(1, len(after) // 10)
    first = statistics.fmean(size for _, size in after[: max(1, tenth // 3)])
    last = statistics.fmean(size for _, size in after[-tenth:])
    slope = statistics.linear_regression(*zip(*after, strict=True)).slope if len(after) > 2 else 0.0
    return {
        "warm_mb": round(first / 1024, 2),
        "end_mb": round(last / 1024, 2),
        "growth_percent": round(100 * (last - first) / first, 2),
        "slope_kb_per_1000": round(slope * 1000, 2),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--warm-up", type=int, default=10_000, help="requests before growth counts")
    parser.add_argument("--connections", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop then, whatever has been done")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-growth", type=float, help="percent; more is exit code 1")
    parser.add_argument("--curve", action="store_true", help="print all samples, to stderr")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    with sides.scratch() as folder:
        model = model_dir.write(Path(folder) / "model")
        side = sides.start_p2pdyn(Path(folder) / "p2pdyn", model, frontends=1, workers=2, router=None)
        try:
            where = urlsplit(side.urls[0])
            began = time.monotonic()
            pids = [process.pid for process in side.processes]
            until = began + arguments.seconds
            run = Run(where.hostname or "", where.port or 0, pids, arguments.requests, until)
            uvloop.run(load(run, arguments.connections, arguments.seed))
            seconds = time.monotonic() - began
            side.check_alive()
        finally:
            side.stop()
    if arguments.curve:
        for done, sizes in run.samples:
            print(done, *sizes, file=sys.stderr)
    found = [figures(run.samples, position, arguments.warm_up) for position in range(len(run.pids))]
    rate = round(run.done / seconds)
    print(
        json.dumps(
            {
                "bench": "memory_growth",
                "requests": run.done,
                "req_s": rate,
                "outcomes": dict(sorted(run.outcomes.items())),
                "frontend": found[0],
                "workers": found[1:],
            }
        )
    )
    limit = arguments.max_growth
    return int(limit is not None and any(one["growth_percent"] > limit for one in found))


if __name__ == "__main__":
    sys.exit(main())
