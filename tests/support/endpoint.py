"""A running endpoint for tests, and a raw client that says exactly what it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop

from p2pdyn.core.types import Address
from p2pdyn.http.server import HttpServer, HttpSettings
from support.local_backend import LocalBackend

T = TypeVar("T")
WAIT_S = 20.0
CHAT = {"model": "sim", "messages": [{"role": "user", "content": "Hello there"}]}


def run(main: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(main, 50)

    return uvloop.run(bounded())


@dataclass
class Endpoint:
    url: str
    port: int
    backend: LocalBackend
    server: HttpServer


@asynccontextmanager
async def endpoint(*engine_args: str, **settings: Any) -> AsyncIterator[Endpoint]:
    backend = LocalBackend(*(engine_args or ("--speedup", "0")))
    server = HttpServer(backend, HttpSettings(Address("127.0.0.1", 0), **settings))
    url = await server.start()
    try:
        yield Endpoint(url, int(url.rpartition(":")[2]), backend, server)
    finally:
        await server.stop(0.2)
        backend.close()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return error  # type: ignore[no-any-return]

    @property
    def events(self) -> list[dict[str, Any]]:
        found = [line[6:] for line in self.body.decode().split("\n\n") if line]
        return [json.loads(line) for line in found if line != "[DONE]"]


@dataclass
class Client:
    """One connection. ``limit``: so many bytes are read ahead."""

    port: int
    limit: int = 2**26
    reader: asyncio.StreamReader = field(init=False)
    writer: asyncio.StreamWriter = field(init=False)

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=self.limit)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, path: str, content: Any, headers: str = "") -> Answer:
        await self.send(request(path, content, headers))
        return await self.answer()

    async def get(self, path: str, headers: str = "", method: str = "GET") -> Answer:
        await self.send(f"{method} {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode())
        return await self.answer(body=method != "HEAD")

    async def answer(self, body: bool = True) -> Answer:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), WAIT_S)
        status, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        content = b""
        if not body:
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while True:
                size = int(await asyncio.wait_for(self.reader.readline(), WAIT_S), 16)
                chunk = await asyncio.wait_for(self.reader.readexactly(size + 2), WAIT_S)
                if not size:
                    break
                content += chunk[:-2]
        elif "content-length" in headers:
            content = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), WAIT_S)
        else:
            content = await asyncio.wait_for(self.reader.read(), WAIT_S)
        return Answer(int(status.split()[1]), headers, content)

    async def closed(self) -> bool:
        """The server ends the connection without another byte."""
        try:
            return await asyncio.wait_for(self.reader.read(1), WAIT_S) == b""
        except ConnectionError:
            return True


def request(path: str, content: Any, headers: str = "") -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


async def until(condition: Any, what: str, within: float = 10.0) -> None:
    """Poll on the loop until the condition holds."""
    deadline = asyncio.get_running_loop().time() + within
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.01)
