"""The clients of bench/faults.py: requests of several kinds, the silences in their answers, and what they said."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

REQUEST_S = 60.0
CLONE_NEWNET = 0x40000000

KINDS: tuple[dict[str, Any], ...] = (
    {"stream": True, "temperature": 0},
    {"stream": True, "temperature": 0.9, "seed": 7},
    {"stream": True, "temperature": 0, "n": 2},
    {"stream": True, "temperature": 0, "stop": ["\x00never\x00"]},
    {"stream": False, "temperature": 0.7, "seed": 11},
    {"stream": False, "temperature": 0, "n": 2},
)


@dataclass
class Answer:
    """One request. ``silence`` is the longest time without a byte once the answer had begun, its end included;
    ``sayings`` is what must not depend on faults: each choice's text and finish, and the counts of usage."""

    slot: int
    streamed: bool
    began: float
    ended: float = 0.0
    silence: float = 0.0
    silent_at: float = 0.0
    error: str = ""
    sayings: Any = None
    workers: list[str] = field(default_factory=list)
    migrations: int = 0
    """Of the choice that had most, about."""
    first_worker: str = ""


class Load:
    """``bodies`` are cycled through by one client each, over ``urls`` in turn, until :meth:`halt`."""

    def __init__(self, urls: Sequence[str], bodies: Sequence[dict[str, Any]], space: str = "") -> None:
        self.urls, self.bodies, self.space = urls, bodies, space
        self.answers: list[Answer] = []
        self.open: dict[int, Answer] = {}
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._main)

    def start(self) -> None:
        self._thread.start()

    def halt(self) -> None:
        """Let what is open end, and begin nothing more."""
        self._halt.set()
        self._thread.join()

    def _main(self) -> None:
        if self.space:
            enter(self.space)
        asyncio.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*(self._client(slot) for slot in range(len(self.bodies))))

    async def _client(self, slot: int) -> None:
        await asyncio.sleep(slot * 0.02)
        turn = slot
        while not self._halt.is_set():
            answer = await ask(self.urls[turn % len(self.urls)], self.bodies[slot], slot, self.open)
            self.answers.append(answer)
            turn += 1

    def once(self) -> list[Answer]:
        """Each body once, undisturbed."""
        self._halt.set()

        async def main() -> list[Answer]:
            return list(await asyncio.gather(*(ask(self.urls[0], b, s, {}) for s, b in enumerate(self.bodies))))

        answers: list[Answer] = []

        def run() -> None:
            if self.space:
                enter(self.space)
            answers.extend(asyncio.run(main()))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return answers


def enter(space: str) -> None:
    """Move this thread into a network namespace: sockets that it makes from now on are there."""
    descriptor = os.open(f"/run/netns/{space}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {space}")
    finally:
        os.close(descriptor)


def bodies(count: int, tokens: int, mixed: bool, words: int = 24) -> list[dict[str, Any]]:
    """``count`` requests, each with a prompt of its own."""
    made = []
    for slot in range(count):
        prompt = " ".join(f"w{slot}x{i}" for i in range(words))
        kind = KINDS[slot % len(KINDS)] if mixed else KINDS[0]
        body = {"model": "sim", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **kind}
        if kind["stream"]:
            body["stream_options"] = {"include_usage": True}
        made.append(body)
    return made


async def ask(url: str, body: dict[str, Any], slot: int, registry: dict[int, Answer]) -> Answer:
    """Send one request and read its answer to the end; never raises."""
    answer = registry[slot] = Answer(slot, body["stream"], time.monotonic())
    try:
        await asyncio.wait_for(_exchange(url, body, answer), REQUEST_S)
    except TimeoutError:
        answer.error = answer.error or f"no end within {REQUEST_S:g} s"
    except (OSError, ValueError, KeyError) as error:
        answer.error = repr(error)
    answer.ended = time.monotonic()
    registry.pop(slot, None)
    return answer


async def _exchange(url: str, body: dict[str, Any], answer: Answer) -> None:
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**24)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reply = bytearray()
    try:
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        last = 0.0
        while part := await reader.read(65536):
            now = time.monotonic()
            if not reply:
                answer.first_worker = _header(part, b"x-p2pdyn-worker")
            elif now - last > answer.silence:
                answer.silence, answer.silent_at = now - last, last
            last = now
            reply += part
    finally:
        writer.close()
    _read(bytes(reply), body["stream"], answer)


def _header(head: bytes, name: bytes) -> str:
    for line in head.split(b"\r\n\r\n")[0].split(b"\r\n"):
        if line.lower().startswith(name + b":"):
            return line.partition(b":")[2].strip().decode()
    return ""


def _read(reply: bytes, streamed: bool, answer: Answer) -> None:
    head, _, rest = reply.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        answer.error = reply.decode(errors="replace")[-300:] or "no answer"
        return
    if not streamed:
        whole = json.loads(rest)
        texts = {c["index"]: (c["text"], c["finish_reason"]) for c in whole["choices"]}
        _took(answer, texts, whole["usage"], whole["p2pdyn"])
        return
    if b"data: [DONE]" not in rest:
        answer.error = f"the stream ended without an end: {rest[-300:]!r}"
        return
    pieces: dict[int, tuple[str, str | None]] = {}
    usage, facts = None, None
    for event in _events(rest):
        if "error" in event:
            answer.error = str(event["error"])
            return
        usage, facts = event.get("usage") or usage, event.get("p2pdyn") or facts
        for choice in event["choices"]:
            text, finish = pieces.get(choice["index"], ("", None))
            pieces[choice["index"]] = (text + (choice["text"] or ""), choice["finish_reason"] or finish)
    if usage is None or facts is None:
        answer.error = "the stream had no usage"
        return
    _took(answer, pieces, usage, facts)


def _took(answer: Answer, texts: dict[int, Any], usage: dict[str, Any], facts: dict[str, Any]) -> None:
    counts = tuple(usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens"))
    answer.sayings = (sorted(texts.items()), counts)
    answer.workers, answer.migrations = facts["workers"], -(-facts["migrations"] // len(texts))
    if usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"]:
        answer.error = f"cached_tokens above prompt_tokens: {usage}"


def _events(data: bytes) -> Iterator[dict[str, Any]]:
    for line in _dechunk(data).split(b"\n"):
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def _dechunk(data: bytes) -> bytes:
    whole = bytearray()
    at = 0
    while at < len(data):
        end = data.index(b"\r\n", at)
        size = int(data[at:end], 16)
        if not size:
            break
        whole += data[end + 2 : end + 2 + size]
        at = end + 4 + size
    return bytes(whole)


@contextmanager
def loading(load: Load) -> Iterator[Load]:
    load.start()
    try:
        yield load
    finally:
        load.halt()
