"""Load for servers that speak OpenAI's HTTP, and the statistics of alternating pairs."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gpu_model import LETTERS
from gpu_side import BenchError

FIRST = re.compile(rb'"(?:text|content)":\s*"[^"]')
USED = re.compile(rb'"completion_tokens":\s*(\d+)')
PROMPT = re.compile(rb'"prompt_tokens":\s*(\d+)')
REQUEST_S = 90.0
RESAMPLES = 10_000


@dataclass(frozen=True)
class Load:
    """``prompt`` tokens in, ``tokens`` out, by ``streams`` clients at once."""

    prompt: int
    tokens: int
    streams: int
    temperature: float = 0.0


@dataclass(frozen=True)
class Reply:
    """Seconds from sending to the first text and to the end."""

    ttft: float
    end: float
    prompt: int
    tokens: int


def text(rng: random.Random, tokens: int) -> str:
    """Text of about so many tokens: words of two letters are one each, with the space before."""
    return " ".join("".join(rng.choices(LETTERS, k=2)) for _ in range(tokens))


def ids(rng: random.Random, tokens: int, vocabulary: int) -> list[int]:
    return [rng.randrange(vocabulary - 3) for _ in range(tokens)]


def body(prompt: str | list[int], tokens: int, **more: Any) -> dict[str, Any]:
    asked = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return asked | more


async def stream(url: str, asked: dict[str, Any]) -> Reply:
    """One streamed request on a connection of its own. Raises BenchError for anything but a whole answer."""
    where = urlsplit(url)
    data = json.dumps({**asked, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    async with asyncio.timeout(REQUEST_S):
        sent = time.perf_counter()
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        parts, first = [], 0.0
        try:
            writer.write(head.encode() + data)
            while part := await reader.read(65536):
                if not first and FIRST.search(part):
                    first = time.perf_counter() - sent
                parts.append(part)
        finally:
            writer.close()
    end, whole = time.perf_counter() - sent, b"".join(parts)
    used, prompt = USED.findall(whole), PROMPT.findall(whole)
    if not first or not used or int(used[-1]) != asked["max_tokens"] or b"data: [DONE]" not in whole:
        raise BenchError(f"{url} gave no whole answer: {whole[:300]!r} ... {whole[-300:]!r}")
    return Reply(first, end, int(prompt[-1]), int(used[-1]))


async def closed(url: str, load: Load, requests: int, seed: int) -> tuple[float, list[Reply]]:
    """``load.streams`` clients, each with one request after the other: output tokens a second, and all replies."""
    rng = random.Random(seed)
    waiting = [body(text(rng, load.prompt), load.tokens, temperature=load.temperature) for _ in range(requests)]
    replies: list[Reply] = []

    async def client() -> None:
        while waiting:
            replies.append(await stream(url, waiting.pop()))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(load.streams):
            group.create_task(client())
    return requests * load.tokens / (time.perf_counter() - started), replies


async def paced(url: str, load: Load, rate: float, requests: int, seed: int) -> list[Reply]:
    """Requests that come as a Poisson process, ``rate`` a second, whatever has been answered."""
    rng = random.Random(seed)
    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for _ in range(requests):
            asked = body(text(rng, load.prompt), load.tokens)
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(group.create_task(stream(url, asked)))
    return [task.result() for task in tasks]


def run(work: Any, limit_s: float) -> Any:
    """Run a coroutine. Raises BenchError, also when it takes longer than ``limit_s``."""

    async def bounded() -> Any:
        async with asyncio.timeout(limit_s):
            return await work

    try:
        return asyncio.run(bounded())
    except ExceptionGroup as group:
        raise BenchError(f"{type(group.exceptions[0]).__name__}: {group.exceptions[0]}") from group
    except TimeoutError as error:
        raise BenchError(f"requests took more than {limit_s:.0f} s") from error
    except OSError as error:
        raise BenchError(f"the server's connection failed: {error}") from error


def median_ms(values: Sequence[float]) -> float:
    return round(statistics.median(values) * 1e3, 3)


def interval(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median, and the 95 % interval of it by bootstrap."""
    rng = random.Random(1)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    low, high = medians[int(RESAMPLES * 0.025)], medians[int(RESAMPLES * 0.975)]
    return {"median": round(statistics.median(values), digits), "ci95": [round(low, digits), round(high, digits)]}
