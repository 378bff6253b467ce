"""Admin commands over the control link: one call, an answer in pages that fit into control messages.

Whoever the control link lets in (CURVE, or loopback) may call; there are no further rights.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from p2pdyn.constants import CONTROL_MAX
from p2pdyn.core.types import Address
from p2pdyn.net.sockets import Sockets
from p2pdyn.wire.codec import WireError, decode, encode
from p2pdyn.wire.header import ADMIN_PAGE, ADMIN_PAGES, AdminCall, AdminPage, Header
from p2pdyn.wire.schema import CONTROL

log = logging.getLogger(__name__)

ANSWER_S = 30.0
"""A handler that takes longer has failed."""
MAX_CALLS = 16

Handler = Callable[[dict[str, Any]], dict[str, Any] | Awaitable[dict[str, Any]]]


class AdminError(RuntimeError):
    """The peer understood the call and refused or failed; the message is its sentence."""


class AdminDesk:
    """Answers calls with the handlers registered."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._running: set[asyncio.Task[None]] = set()

    def on(self, op: str, handler: Handler) -> None:
        self._handlers[op] = handler

    def answer(self, call: AdminCall, reply: Callable[[AdminPage], bool]) -> None:
        """Run the handler and send its pages with ``reply``."""
        if len(self._running) >= MAX_CALLS:
            reply(AdminPage(call.ticket, 0, 1, "too many admin calls at once: try again", b""))
            return
        task = asyncio.get_running_loop().create_task(self._run(call, reply))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, call: AdminCall, reply: Callable[[AdminPage], bool]) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                data = await self._result(call)
            parts = [data[i : i + ADMIN_PAGE] for i in range(0, len(data), ADMIN_PAGE)]
            if len(parts) > ADMIN_PAGES:
                raise ValueError("the answer is too large")
        except (AdminError, LookupError, ValueError, TimeoutError) as error:
            text = str(error) or "it took too long"
            reply(AdminPage(call.ticket, 0, 1, text[:500].encode()[:500].decode(errors="ignore"), b""))
            return
        except Exception:
            log.exception("admin operation %s failed", call.op)
            reply(AdminPage(call.ticket, 0, 1, f"{call.op} failed: see the peer's log", b""))
            return
        for page, part in enumerate(parts):
            if not reply(AdminPage(call.ticket, page, len(parts), "", part)):
                return

    async def _result(self, call: AdminCall) -> bytes:
        handler = self._handlers.get(call.op)
        if handler is None:
            raise AdminError(f"unknown admin operation {call.op!r}: is the peer older than this command?")
        args = orjson.loads(call.args)
        if not isinstance(args, dict):
            raise AdminError("the arguments are not a JSON object")
        result = handler(args)
        if inspect.isawaitable(result):
            result = await result
        return orjson.dumps(result)

    def close(self) -> None:
        for task in self._running:
            task.cancel()


async def admin_call(
    sockets: Sockets, address: Address, op: str, args: dict[str, Any], timeout_s: float
) -> dict[str, Any]:
    """Ask the peer at ``address``, a name or an IP address, and return its answer.

    Raises ConnectionError with the reason if it cannot be reached or refuses this side's key, TimeoutError after
    ``timeout_s``, and AdminError with the peer's sentence.
    """
    async with asyncio.timeout(timeout_s):
        return await _call(sockets, await _resolve(address), op, args)


async def _call(sockets: Sockets, address: Address, op: str, args: dict[str, Any]) -> dict[str, Any]:
    answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    pages: list[bytes] = []

    def receive(frames: list[bytes]) -> None:
        if answer.done():
            return
        try:
            page = decode(CONTROL, frames[-1])
            if not isinstance(page, AdminPage) or page.page != len(pages):
                raise WireError("not the next page of an answer")
        except WireError as error:
            answer.set_exception(ConnectionError(f"{address} gave an answer that cannot be read: {error}"))
            return
        pages.append(page.data)
        if page.error:
            answer.set_exception(AdminError(page.error))
        elif len(pages) >= page.pages:
            answer.set_result(b"".join(pages))

    def fail(reason: str) -> None:
        if not answer.done():
            answer.set_exception(ConnectionError(reason))

    def ask() -> None:
        header = encode(Header("", "", 0, time.time_ns() // 1_000_000))
        if not link.send((header, encode(AdminCall(0, op, orjson.dumps(args))))):
            fail(f"{address} takes no messages")

    link = sockets.dealer(address, receive, max_size=CONTROL_MAX, on_up=ask, on_down=fail)
    try:
        result = orjson.loads(await answer)
    finally:
        link.close()
    if not isinstance(result, dict):
        raise ConnectionError(f"{address} gave an answer that is no JSON object")
    return result


async def _resolve(address: Address) -> Address:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, family=socket.AF_UNSPEC)
    except OSError as error:
        raise ConnectionError(f"the name {address.host} does not resolve ({error.strerror})") from None
    # IPv4 first: `localhost` names both, and a peer without a key listens on 127.0.0.1.
    hosts = sorted((entry[4][0] for entry in found), key=lambda host: ":" in str(host))
    return Address(str(hosts[0]), address.port)
