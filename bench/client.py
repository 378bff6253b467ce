"""The clients: wrk for throughput, a plain socket for time to first token, a check that both sides do the same."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import model_dir
from sides import MODEL

LUA = Path(__file__).with_name("load.lua")
DISTINCT = 512
"""Bodies in the file that wrk cycles through; the running number makes each request's prompt unique all the same."""
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Load:
    """Chat requests of `words` words for exactly `tokens` tokens, over `connections` connections kept alive."""

    name: str
    stream: bool
    tokens: int
    words: int
    connections: int


LOADS = [
    Load("plain-1", stream=False, tokens=1, words=20, connections=32),
    Load("plain-32", stream=False, tokens=32, words=200, connections=32),
    Load("stream-32", stream=True, tokens=32, words=200, connections=32),
    Load("stream-128", stream=True, tokens=128, words=200, connections=64),
]
TTFT = Load("ttft", stream=True, tokens=32, words=200, connections=1)


class CheckFailed(Exception):
    """A side does not do what the comparison presumes."""


def bodies(load: Load, *, usage: bool = False, count: int = DISTINCT) -> list[str]:
    """`count` request bodies, the same for both sides; each prompt begins with the word 00000000, to be replaced."""
    rng = random.Random(load.name)
    vocabulary = model_dir.words()
    made = []
    for _ in range(count):
        content = "00000000 " + model_dir.text(rng, vocabulary, load.words - 1)
        body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": load.tokens, "ignore_eos": True, "temperature": 0}
        body |= {"stream": True} if load.stream else {}
        body |= {"stream_options": {"include_usage": True}} if usage else {}
        made.append(json.dumps(body))
    return made


def wrk(urls: list[str], load: Load, seconds: float, scratch: Path, offset: int) -> dict[str, float]:
    """One wrk with one thread a frontend, the load's connections shared out; sums and worst latencies."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    file = scratch / f"{load.name}.jsonl"
    file.write_text("\n".join(bodies(load)) + "\n")
    each = max(1, load.connections // len(urls))
    command = [
        "wrk",
        "-t1",
        f"-c{each}",
        f"-d{max(1, round(seconds))}s",
        "--timeout",
        f"{TIMEOUT_S:.0f}s",
        "-s",
        str(LUA),
    ]
    running = []
    for i, url in enumerate(urls):
        env = {**os.environ, "BENCH_BODIES": str(file), "BENCH_OFFSET": str((offset + i * 10_000_000) % 90_000_000)}
        running.append(subprocess.Popen([*command, url], env=env, stdout=subprocess.PIPE, text=True))
    results = []
    for process in running:
        out, _ = process.communicate(timeout=seconds + TIMEOUT_S + 10)
        results.append(json.loads(out.strip().splitlines()[-1]))
    total = {key: sum(result[key] for result in results) for key in ("requests", "bytes", "bad")}
    rate = sum(result["requests"] / result["seconds"] for result in results)
    return {
        "req_s": round(rate, 1),
        "tok_s": round(rate * load.tokens, 1),
        "p50_ms": max(result["p50_ms"] for result in results),
        "p99_ms": max(result["p99_ms"] for result in results),
        "bad": total["bad"],
        "bytes_per_request": round(total["bytes"] / max(1, total["requests"])),
    }


def exchange(url: str, body: str) -> tuple[float, bytes]:
    """One request on a connection of its own: seconds to the first token's text, and the whole reply."""
    where = urlsplit(url)
    data = body.encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    start = time.perf_counter()
    first = 0.0
    received = b""
    with socket.create_connection((where.hostname or "", where.port or 80), TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head.encode() + data)
        while chunk := connection.recv(65536):
            received += chunk
            if not first and re.search(rb'"content":\s*"[^"]', received):
                first = time.perf_counter() - start
    return first, received


def ttft(url: str, requests: int, offset: int) -> dict[str, float]:
    """Milliseconds to the first token's text, one request at a time, one connection each."""
    made = bodies(TTFT)
    times = []
    for i in range(requests):
        first, reply = exchange(url, made[i % len(made)].replace("00000000", f"{(offset + i) % 10**8:08d}", 1))
        if not first or b"[DONE]" not in reply:
            raise CheckFailed(f"stream without a token or an end: {reply[:300]!r}")
        times.append(first * 1e3)
    cuts = statistics.quantiles(times, n=100)
    return {"ttft_p50_ms": round(cuts[49], 3), "ttft_p99_ms": round(cuts[98], 3), "requests": requests}


def check(url: str, load: Load, offset: int) -> dict[str, int]:
    """Raises CheckFailed unless exactly `tokens` tokens come, streamed as one event each; returns what usage says."""
    (body,) = bodies(load, usage=load.stream, count=1)
    _, reply = exchange(url, body.replace("00000000", f"{offset % 10**8:08d}", 1))
    head, _, rest = reply.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0] + b" ":
        raise CheckFailed(f"{load.name}: {reply[:500]!r}")
    text = _dechunk(rest) if b"transfer-encoding: chunked" in head.lower() else rest
    if load.stream:
        events = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: {")]
        tokens = sum(1 for event in events for choice in event["choices"] if choice["delta"].get("content"))
        usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
        if tokens != load.tokens:
            raise CheckFailed(f"{load.name}: {tokens} events with text for {load.tokens} tokens")
    else:
        usage = json.loads(text)["usage"]
    counts = {key: usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    if counts["completion_tokens"] != load.tokens:
        raise CheckFailed(f"{load.name}: usage is {counts}")
    return {**counts, "reply_bytes": len(reply)}


def _dechunk(data: bytes) -> bytes:
    whole = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        if not length:
            break
        whole, data = whole + data[:length], data[length + 2 :]
    return whole
