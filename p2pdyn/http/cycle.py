"""An exchange as an ASGI application sees it: uvicorn's own request/response cycle on our connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl

from p2pdyn.http.exchange import Exchange

if TYPE_CHECKING:
    from p2pdyn.http.protocol import Connection

log = logging.getLogger(__name__)

CLOSE = (b"connection", b"close")


class Outlet:
    """What a cycle uses of its transport: bytes pass through the connection, which counts them."""

    def __init__(self, connection: Connection) -> None:
        self.write = connection.send_bytes
        self.close = connection.transport.close
        self.is_closing = connection.transport.is_closing


class Cycle(RequestResponseCycle):
    """Runs an application on an exchange whose body is complete. A client that leaves cancels it."""

    def __init__(self, exchange: Exchange) -> None:
        connection = exchange.connection
        flow = FlowControl(connection.transport)
        if connection.is_full():
            flow.pause_writing()
        connection.flow = flow
        super().__init__(
            scope=_scope(exchange),
            transport=cast(asyncio.Transport, Outlet(connection)),
            flow=flow,
            logger=log,
            access_logger=log,
            access_log=False,
            default_headers=connection.shared.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,  # the connection has seen to it
            keep_alive=exchange.keep_alive,
            on_response=lambda: connection.answered(exchange),
        )
        self._exchange = exchange
        self.body = bytearray(exchange.body)
        self.more_body = False
        self.message_event.set()

    async def run_asgi(self, app: Any) -> None:
        task = asyncio.current_task()

        def left() -> None:
            self.disconnected = True
            if task is not None:
                task.cancel()

        async def until_left(scope: Any, receive: Any, send: Any) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await app(scope, receive, send)

        self._exchange.on_disconnect = left
        await super().run_asgi(until_left)
        self._exchange.on_disconnect = None

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            exchange = self._exchange
            exchange.started, exchange.status = True, message["status"]
            self.keep_alive = exchange.keep_alive  # the server may have begun to stop
            headers = [*message.get("headers", ()), (b"x-request-id", exchange.request_id)]
            if not self.keep_alive and CLOSE not in headers:  # uvicorn says so by itself in new versions only
                headers.append(CLOSE)
            message = {**message, "headers": headers}
        await super().send(message)


def _scope(exchange: Exchange) -> Any:
    """The ASGI scope. Of headers that come more than once it has the last."""
    transport = exchange.connection.transport
    url = httptools.parse_url(exchange.target)
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": exchange.version,
        "server": get_local_addr(transport),
        "client": get_remote_addr(transport),
        "scheme": "https" if is_ssl(transport) else "http",
        "method": exchange.method,
        "root_path": "",
        "path": exchange.path,
        "raw_path": url.path or b"/",
        "query_string": url.query or b"",
        "headers": list(exchange.fields.items()),
        "state": {},
    }
