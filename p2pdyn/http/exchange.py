"""One request and its answer on a connection.

The body is complete before a handler sees the request.  An ASGI application sees it through
:class:`p2pdyn.http.cycle.Cycle`.  The generation routes take the short way: :meth:`Exchange.respond`,
:meth:`Exchange.stream` and :meth:`Exchange.write` put ready-made bytes on the transport, with no await.  A handler may
return before the answer is complete; then :attr:`Exchange.on_disconnect` tells it that the client has left.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from p2pdyn.core.request import Rejected
from p2pdyn.http.errors import HttpError, internal

if TYPE_CHECKING:
    from p2pdyn.http.protocol import Connection

log = logging.getLogger(__name__)

REQUEST_ID = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.:")
MAX_REQUEST_ID = 128
JSON = b"content-type: application/json\r\n"
EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
STATUS_LINE = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}


class Exchange:
    """``fields`` are the request's headers by lower-case name (the last of several); ``body`` is its whole body;
    ``target`` is what was asked for as it came, ``path`` the unescaped path of it."""

    __slots__ = (
        "_head", "body", "connection", "disconnected", "fields", "keep_alive", "method", "on_disconnect", "path",
        "request_id", "size", "started", "status", "target", "version",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        method: str,
        target: bytes,
        path: str,
        fields: dict[bytes, bytes],
        version: str,
        keep_alive: bool,
    ) -> None:
        self.connection = connection
        self.method, self.target, self.path, self.fields = method, target, path, fields
        self.version, self.keep_alive = version, keep_alive
        self.body: bytes | bytearray = b""
        self.size = 0
        """Bytes of its body, also when that is gone."""
        self.request_id = _request_id(fields.get(b"x-request-id"))
        self.started = self.disconnected = False
        self.status = 0
        self.on_disconnect: Callable[[], None] | None = None
        self._head = b""

    def respond(self, status: int, body: bytes, headers: bytes = b"") -> None:
        """The whole answer at once, as JSON."""
        if self.disconnected or self.started:
            return
        head = self._start(status, b"%bcontent-length: %d\r\n%b" % (JSON, len(body), headers))
        self.connection.send_bytes(head if self.method == "HEAD" else head + body)
        self.connection.answered(self)

    def fail(self, error: HttpError) -> None:
        self.respond(error.status, error.body(), error.headers)

    def broke(self, error: Exception) -> None:
        """A handler ended with ``error``: an answer if it is a refusal, else a fault of ours."""
        if isinstance(error, HttpError):
            self.fail(error)
        elif isinstance(error, Rejected):
            self.fail(HttpError.of(error.failure))
        else:
            log.error("request %s %s failed", self.method, self.path, exc_info=error)
            if self.started:
                self.connection.transport.abort()
            else:
                self.fail(internal())

    def stream(self, headers: bytes) -> None:
        """Begin a 200 event stream; its head leaves with the first :meth:`write`."""
        framing = b"transfer-encoding: chunked\r\n" if self.version != "1.0" else b""
        self._head = self._start(200, b"%b%b%b" % (EVENT_STREAM, framing, headers))

    def write(self, data: bytes, last: bool = False) -> None:
        """Bytes of the event stream. A reader that is too far behind loses the connection instead."""
        if self.disconnected:
            return
        connection = self.connection
        if connection.is_far_behind():
            connection.cut_slow_reader()
            return
        if self.version != "1.0":
            data = b"%b%x\r\n%b\r\n%b" % (self._head, len(data), data, b"0\r\n\r\n" if last else b"")
        elif self._head:
            data = self._head + data
        self._head = b""
        connection.send_bytes(data)
        if last:
            connection.answered(self)

    def _start(self, status: int, headers: bytes) -> bytes:
        self.started = True
        self.status = status
        close = b"" if self.keep_alive else b"connection: close\r\n"
        date = self.connection.shared.date
        return b"%b%b%b%b%b\r\n" % (STATUS_LINE[status], date, headers, self.identity(), close)

    @property
    def client(self) -> str:
        """Whose request it is, where clients share something."""
        return self.connection.shared.gate.client(self.connection.host, self.fields)

    def identity(self) -> bytes:
        return b"x-request-id: %b\r\n" % self.request_id

    def lost(self) -> None:
        """The client has left."""
        self.disconnected = True
        callback, self.on_disconnect = self.on_disconnect, None
        if callback is not None:
            callback()


def _request_id(given: bytes | None) -> bytes:
    """The client's own if it is harmless in a header and a log, else a fresh one."""
    if given and len(given) <= MAX_REQUEST_ID and REQUEST_ID.issuperset(given):
        return given
    return b"%032x" % random.getrandbits(128)
