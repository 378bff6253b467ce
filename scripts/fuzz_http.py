#!/usr/bin/env python3
"""Fuzz the HTTP endpoint: bodies near the schemas, and bytes near HTTP, for a given time.

    python scripts/fuzz_http.py --seconds 60 [--seed N]

Ends with 1, and prints the input, at the first answer 500, the first answer that is not of the documented kind, or the
first connection that is left without one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.endpoint import CHAT, Client, endpoint

from p2pdyn.http.openai import CHAT as CHAT_FIELDS
from p2pdyn.http.openai import COMPLETION as TEXT_FIELDS
from p2pdyn.http.settings import Limits

VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**CHAT, "max_tokens": 3}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "stop": ["a", "b"]}),
    ("/v1/completions", {"model": "sim", "prompt": ["x", "y"], "n": 2, "max_tokens": 2, "echo": True}),
    ("/v1/completions", {"model": "sim", "prompt": [1, 2, 3], "max_tokens": 2, "logprobs": 1, "seed": 1}),
]
LEAVES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 1e308, -0.0, 0.5, "", "x", "sim", "\u0000", "\U0001f600" * 9,
    "{{ 7 }}", "<|im_end|>", [], [[]], {}, {"type": "text"}, [0], [2**32], ["a"] * 200, "a" * 5000, [None], [{}],
]  # fmt: skip
PIECES = [
    b"GET ", b"POST ", b"HEAD ", b"/live", b"/v1/models", b"/v1/completions", b" HTTP/1.1", b" HTTP/1.0", b"\r\n",
    b"\n",
    b"\r\n\r\n", b"Host: x", b"Content-Length: ", b"5", b"-1", b"99999999999", b"Transfer-Encoding: chunked", b"5\r\n",
    b"0\r\n\r\n", b"Expect: 100-continue", b"Connection: close", b"Upgrade: h2c", b"\x00", b"\xff\xfe", b": ",
    b"a" * 999, b'{"model":"sim"}', b"%", b"%00%ff", b"?q=1", b"#", b"Authorization: Bearer x", b"x-request-id: \x7f",
    b"*", b"//[",
]  # fmt: skip
QUICK = Limits(header_s=0.2, body_s=0.2, linger_s=0.2, idle_s=0.2)
DOCUMENTED = {200, 400, 401, 404, 405, 408, 411, 413, 429, 431, 503}


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one or more things changed, somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(
            [*value, rng.choice([*CHAT_FIELDS, *TEXT_FIELDS]), rng.choice(["", "x", "\u00e9", "__class__"])]
        )
        return {**value, name: mutated(rng, value.get(name))}
    if isinstance(value, list) and value and rng.random() < 0.6:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(rng, value[index]), *value[index + 1 :]]
    return rng.choice(LEAVES)


def body(rng: random.Random, content: Any) -> bytes:
    """As JSON, now and then broken JSON."""
    data = bytearray(json.dumps(content).encode())
    while data and rng.random() < 0.2:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


async def try_body(rng: random.Random, port: int) -> None:
    path, content = rng.choice(VALID)
    for _ in range(rng.randrange(4)):
        content = mutated(rng, content)
    data = body(rng, content)
    if b"max_" not in data:  # an answer as long as the context proves nothing more, and takes long
        return
    async with Client(port) as client:
        answer = await client.post(path, data)
        check(answer, data)


async def try_bytes(rng: random.Random, port: int) -> None:
    data = b"".join(rng.choices(PIECES, k=rng.randrange(1, 14)))
    async with Client(port) as client:
        await client.send(data)
        try:
            check(await client.answer(), data)
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # an empty line, or nothing that began a request: closed in silence


def check(answer: Any, data: bytes) -> None:
    assert answer.status in DOCUMENTED, (answer.status, data, answer.body)
    if answer.status != 200 and not (b"HEAD" in data and not answer.body):
        assert answer.error["code"], data


async def main(seconds: float, seed: int) -> int:
    rng = random.Random(seed)
    began, tries = time.monotonic(), 0
    async with endpoint("--speedup", "0", "--context", "4096", limits=QUICK) as served:
        while time.monotonic() - began < seconds:
            batch = [rng.choice((try_body, try_body, try_bytes))(rng, served.port) for _ in range(16)]
            await asyncio.wait_for(asyncio.gather(*batch), 30)
            tries += len(batch)
        assert not served.backend.running, "something still runs"
        assert served.server.metrics.streams == 0
        internal = sum(count for (_, code), count in served.server.metrics.requests.items() if code == 500)
    print(
        json.dumps(
            {"tries": tries, "seconds": round(time.monotonic() - began, 1), "seed": seed, "status_500": internal}
        )
    )
    return 1 if internal else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    given = parser.parse_args()
    print(f"seed {given.seed}", file=sys.stderr)
    sys.exit(uvloop.run(main(given.seconds, given.seed)))
