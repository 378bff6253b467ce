"""One request and its answer on a connection.

An ASGI application sees uvicorn's own cycle.  The generation routes take the short way: the body is complete before
the application starts, and :meth:`Exchange.respond`, :meth:`Exchange.stream` and :meth:`Exchange.write` put ready-made
bytes on the transport, with no await and no message dictionaries.  The application may return before the answer is
complete (:attr:`Exchange.detached`); then :attr:`Exchange.on_disconnect` tells it that the client has left.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from p2pdyn.http.errors import HttpError, internal

if TYPE_CHECKING:
    from p2pdyn.http.protocol import Connection

log = logging.getLogger(__name__)

REQUEST_ID = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.:")
MAX_REQUEST_ID = 128
EXTENSION = "p2pdyn"
"""The scope extension in which an application finds its ``exchange``."""
JSON = b"content-type: application/json\r\n"
EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"


class Exchange(RequestResponseCycle):
    """``fields`` are the request's headers by lower-case name (the last of several); ``body`` is its whole body."""

    def __init__(self, connection: Connection, fields: dict[bytes, bytes], **cycle: Any) -> None:
        super().__init__(**cycle)
        self.connection = connection
        self.fields = fields
        self.path: str = self.scope["path"]
        self.scope["extensions"] = {EXTENSION: {"exchange": self}}
        self.request_id = _request_id(fields.get(b"x-request-id"))
        self.detached = False
        self.status = 0
        self.on_disconnect: Callable[[], None] | None = None
        self._head = b""

    # ---- the short way

    def respond(self, status: int, body: bytes, headers: bytes = b"") -> None:
        """The whole answer at once, as JSON."""
        if self.disconnected or self.response_started:
            return
        content = b"" if self.scope["method"] == "HEAD" else body
        head = self._start(status, b"%bcontent-length: %d\r\n%b" % (JSON, len(body), headers))
        self.connection.send_bytes(b"%b%b" % (head, content))
        self.complete()

    def fail(self, error: HttpError) -> None:
        self.respond(error.status, error.body(), error.headers)

    def stream(self, headers: bytes) -> None:
        """Begin a 200 event stream; its head leaves with the first :meth:`write`."""
        self.chunked_encoding = self.scope["http_version"] != "1.0"
        framing = b"transfer-encoding: chunked\r\n" if self.chunked_encoding else b""
        self._head = self._start(200, b"%b%b%b" % (EVENT_STREAM, framing, headers))

    def write(self, data: bytes, last: bool = False) -> None:
        """Bytes of the event stream. A reader that is too far behind loses the connection instead."""
        if self.disconnected:
            return
        connection = self.connection
        if connection.unread() > connection.limits.slow_bytes:
            connection.cut_slow_reader()
            return
        if self.chunked_encoding:
            data = b"%b%x\r\n%b\r\n%b" % (self._head, len(data), data, b"0\r\n\r\n" if last else b"")
        elif self._head:
            data = self._head + data
        self._head = b""
        connection.send_bytes(data)
        if last:
            self.complete()

    def _start(self, status: int, headers: bytes) -> bytes:
        self.response_started = True
        self.status = status
        close = b"" if self.keep_alive else b"connection: close\r\n"
        head = (STATUS_LINE[status], self.connection.shared.date, headers, self.identity(), close, b"\r\n")
        return b"".join(head)

    def identity(self) -> bytes:
        return b"x-request-id: %b\r\n" % self.request_id

    def complete(self) -> None:
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    def lost(self) -> None:
        """The client has left."""
        self.disconnected = True
        self.message_event.set()
        callback, self.on_disconnect = self.on_disconnect, None
        if callback is not None:
            callback()

    # ---- what uvicorn does otherwise

    async def run_asgi(self, app: Any) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            log.exception("request %s %s failed", self.scope["method"], self.path)
            if self.response_started:
                self.transport.abort()
            else:
                self.fail(internal())
        else:
            if not (self.response_complete or self.disconnected or self.detached):
                log.error("request %s %s was left without an answer", self.scope["method"], self.path)
                self.transport.abort()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id)]
            message = {**message, "headers": headers}
        await super().send(message)


def _request_id(given: bytes | None) -> bytes:
    """The client's own if it is harmless in a header and a log, else a fresh one."""
    if given and len(given) <= MAX_REQUEST_ID and REQUEST_ID.issuperset(given):
        return given
    return secrets.token_hex(16).encode()


def status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode())
