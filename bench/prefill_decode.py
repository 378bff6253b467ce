"""Prefill and decode on different workers against the same two workers aggregated, on `sim`; one JSON line each.

    python bench/prefill_decode.py [--mover nixl --mover tcp] [--prompt 2000] [--answer 64] [--rate 3] [--seconds 20]

Both sides have two workers with the same timing model and get the same prompts, sides alternating.  `idle`: one request
after the other, so that the difference of TTFT is what the hand-over costs: one more hop, the claim, the read, the
commit and the last block, which the decode worker computes.  `load`: the same Poisson arrivals for both; prefill does
not delay the tokens of others any more, which shows in the time between tokens.
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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from routing_live import words
from support.nodes import Cluster, make_key
from support.pd import PdCluster

REQUEST_S = 60.0


@dataclass
class Answer:
    """Milliseconds: to the first token, and between the following ones."""

    ttft: float
    gaps: list[float]


async def complete(url: str, prompt: str, tokens: int) -> Answer:
    """One streamed completion; AssertionError for anything but a whole answer."""
    where = urlsplit(url)
    body = {"model": "sim", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**24)
    times: list[float] = []
    reply = b""
    try:
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        while part := await reader.read(65536):
            now = time.perf_counter()
            times += [now] * part.count(b'"text":"')
            reply += part
    finally:
        writer.close()
    assert reply.startswith(b"HTTP/1.1 200"), reply[:500]
    assert b"data: [DONE]" in reply, reply[-500:]
    gaps = [(late - early) * 1e3 for early, late in pairwise(times)]
    return Answer((times[0] - started) * 1e3, gaps)


async def one_by_one(url: str, prompts: list[str], tokens: int) -> list[Answer]:
    return [await asyncio.wait_for(complete(url, prompt, tokens), REQUEST_S) for prompt in prompts]


async def poisson(url: str, prompts: list[str], tokens: int, rate: float, rng: random.Random) -> list[Answer]:
    tasks = []
    due = time.perf_counter()
    for prompt in prompts:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(asyncio.wait_for(complete(url, prompt, tokens), REQUEST_S)))
    return list(await asyncio.gather(*tasks))


def summary(answers: list[Answer]) -> dict[str, float]:
    ttft = statistics.quantiles([answer.ttft for answer in answers], n=100)
    gaps = statistics.quantiles([gap for answer in answers for gap in answer.gaps], n=100)
    return {
        "requests": len(answers),
        "ttft_p50_ms": round(ttft[49], 2),
        "ttft_p90_ms": round(ttft[89], 2),
        "itl_p50_ms": round(gaps[49], 2),
        "itl_p99_ms": round(gaps[98], 2),
    }


def side(folder: Path, roles: tuple[str, str], mover: str, given: argparse.Namespace) -> dict[str, object]:
    """Both loads on one cluster."""
    folder.mkdir()
    rng = random.Random(given.seed)
    idle = [words(rng, given.prompt) for _ in range(given.idle)]
    load = [words(rng, given.prompt) for _ in range(round(given.rate * given.seconds))]
    with Cluster(folder, make_key(folder)) as nodes:
        pd = PdCluster(nodes, "sim", mover, always=False)
        args = ("--", "--prefill-tps", str(given.prefill_tps), "--itl-ms", str(given.itl_ms))
        workers = [pd.start(f"w{number}", role, args=args) for number, role in enumerate(roles)]
        pd.ready()
        asyncio.run(one_by_one(pd.frontend.url, [words(rng, given.prompt) for _ in range(3)], 4))  # speeds are measured
        alone = asyncio.run(one_by_one(pd.frontend.url, idle, given.answer))
        loaded = asyncio.run(poisson(pd.frontend.url, load, given.answer, given.rate, rng))
        moved = [pd.transfers(worker)["outcomes"]["filled"] for worker in workers]
    return {"idle": summary(alone), "load": summary(loaded), "pulls": moved}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mover", action="append", help="several: one after the other [nixl, tcp]")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--idle", type=int, default=30, help="requests one after the other")
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second under load")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--prefill-tps", type=float, default=20000.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    arguments.mover = arguments.mover or ["nixl", "tcp"]
    return arguments


def main() -> None:
    given = parse()
    sides = [("aggregated", ("aggregated", "aggregated"), "auto")]
    sides += [(f"prefill/decode over {mover}", ("prefill", "decode"), mover) for mover in given.mover]
    for turn in range(given.rounds):
        for name, roles, mover in sides if turn % 2 == 0 else reversed(sides):
            with tempfile.TemporaryDirectory() as folder:
                found = side(Path(folder) / "cluster", roles, mover, given)
            print(json.dumps({"bench": "prefill_decode", "side": name, "round": turn, **found}), flush=True)


if __name__ == "__main__":
    main()
