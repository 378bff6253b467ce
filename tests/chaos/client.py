"""A client of the OpenAI endpoint that keeps time: one attempt at one frontend, read event by event."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from chaos.answers import Answer, Question

CONNECT_S = 3.0
SILENCE_S = 15.0
"""After so long without a byte a client gives an attempt up."""


@dataclass
class Attempt:
    """``frontend`` by name; ``began`` and ``ended`` on the monotonic clock. ``why`` is empty if the answer was right,
    and begins with "wrong" if there was one and it was not. ``silence`` is the longest time without a byte, from the
    request to the end of the answer."""

    frontend: str
    began: float
    ended: float = 0.0
    silence: float = 0.0
    why: str = ""
    workers: tuple[str, ...] = ()
    migrations: int = 0

    @property
    def right(self) -> bool:
        return not self.why

    @property
    def wrong(self) -> bool:
        return self.why.startswith("wrong")


class Failed(Exception):
    """No answer, and why."""


async def attempt(name: str, url: str, question: Question, right: Answer) -> Attempt:
    """Ask the frontend ``name`` at ``url`` ("HOST:PORT") once."""
    made = Attempt(name, time.monotonic())
    try:
        async with asyncio.timeout(CONNECT_S):
            host, _, port = url.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError) as error:
        made.ended = time.monotonic()
        made.why = f"cannot connect: {error or 'timed out'}"
        return made
    try:
        writer.write(_request(host, question))
        answer = await _read(_Timed(reader, made), question)
        if answer != right:
            made.why = f"wrong: {answer} instead of {right} to {question}"
    except Failed as error:
        made.why = str(error)
    except (OSError, asyncio.IncompleteReadError) as error:
        made.why = f"connection lost: {error}"
    finally:
        made.ended = time.monotonic()
        writer.close()
    return made


def _request(host: str, question: Question) -> bytes:
    body = json.dumps(question.body()).encode()
    head = f"POST {question.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


class _Timed:
    """The connection's bytes; each wait counts as silence."""

    def __init__(self, reader: asyncio.StreamReader, made: Attempt) -> None:
        self._reader = reader
        self.made = made
        self._held = b""
        self._last = made.began

    async def until(self, mark: bytes) -> bytes:
        """Up to and with ``mark``."""
        while (end := self._held.find(mark)) < 0:
            await self._more()
        found, self._held = self._held[: end + len(mark)], self._held[end + len(mark) :]
        return found

    async def exactly(self, size: int) -> bytes:
        while len(self._held) < size:
            await self._more()
        found, self._held = self._held[:size], self._held[size:]
        return found

    async def _more(self) -> None:
        try:
            async with asyncio.timeout(SILENCE_S):
                data = await self._reader.read(65536)
        except TimeoutError:
            raise Failed(f"silent for {SILENCE_S:g} s") from None
        finally:
            now = time.monotonic()
            self.made.silence = max(self.made.silence, now - self._last)
            self._last = now
        if not data:
            raise Failed("the connection was closed before the end of the answer")
        self._held += data


async def _read(source: _Timed, question: Question) -> Answer:
    head = (await source.until(b"\r\n\r\n")).decode().lower()
    status = int(head.split(maxsplit=2)[1])
    if "transfer-encoding: chunked" in head:
        chunks = _chunks(source)
    else:
        length = int(head.partition("content-length:")[2].split("\r\n")[0])
        chunks = _once(await source.exactly(length))
    if status != 200 or not question.stream:
        whole = json.loads(b"".join([chunk async for chunk in chunks]))
        if status != 200:
            raise Failed(f"{status} {whole['error']['code']}: {whole['error']['message']}")
        _told(source.made, whole)
        return _answer(_text(whole["choices"][0], "message"), whole["choices"][0]["finish_reason"], whole["usage"])
    return await _streamed(chunks, source.made)


async def _streamed(chunks: AsyncIterator[bytes], made: Attempt) -> Answer:
    text, finish, usage, held = "", "", None, b""
    async for chunk in chunks:
        *events, held = (held + chunk).split(b"\n\n")
        for data in events:
            if not data.startswith(b"data: "):
                continue  # a comment keeps the connection alive
            if data == b"data: [DONE]":
                if usage is None:
                    raise Failed("the stream ended without usage")
                return _answer(text, finish, usage)
            event = json.loads(data[6:])
            if "error" in event:
                raise Failed(f"error event {event['error']['code']}: {event['error']['message']}")
            for choice in event["choices"]:
                text += _text(choice, "delta")
                finish = choice["finish_reason"] or finish
            usage = event.get("usage") or usage
            _told(made, event)
    raise Failed("the stream ended without [DONE]")


def _text(choice: dict[str, Any], part: str) -> str:
    text = choice["text"] if "text" in choice else choice[part].get("content")
    return text or ""


def _told(made: Attempt, body: dict[str, Any]) -> None:
    if told := body.get("p2pdyn"):
        made.workers, made.migrations = tuple(told["workers"]), told["migrations"]


def _answer(text: str, finish: str, usage: dict[str, Any]) -> Answer:
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    if usage["total_tokens"] != total:
        raise Failed(f"wrong total_tokens: {usage}")
    return Answer(text, finish, usage["prompt_tokens"], usage["completion_tokens"])


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _chunks(source: _Timed) -> AsyncIterator[bytes]:
    """The body of a chunked answer."""
    while size := int((await source.until(b"\r\n"))[:-2], 16):
        yield await source.exactly(size)
        await source.exactly(2)
    await source.exactly(2)
