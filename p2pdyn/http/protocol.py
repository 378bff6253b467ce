"""The connection: uvicorn's httptools protocol with limits, early refusals and JSON errors.

What differs from uvicorn: a request starts its application when its body is complete; before the body is read, the gate
has seen path, method and headers (404, 405, 401, 411, 413); each phase has a deadline, kept by one sweep over all
connections instead of a timer each; an error on any level is JSON; a refused client may still read its answer while it
sends (the connection lingers half-closed).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Any, Protocol, cast
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from p2pdyn.http.errors import HttpError, bad, retry_after
from p2pdyn.http.exchange import JSON, Exchange, status_line
from p2pdyn.http.metrics import HttpMetrics
from p2pdyn.http.settings import Limits

log = logging.getLogger(__name__)

NOT_SENT_LOW = 64 * 1024
"""Bytes that the kernel may hold unsent: beyond it they stay, counted, with us (TCP_NOTSENT_LOWAT)."""

IDLE, HEADER, BODY = "idle", "header", "body"


class Gate(Protocol):
    """Looks at a request before its body is read."""

    def refuse(self, method: str, path: str, fields: dict[bytes, bytes]) -> HttpError | None:
        """Why the request is not read any further, if so."""

    def label(self, path: str) -> str:
        """The path as metrics name it: one of a few."""


class Shared(ServerState):
    """What all connections of one server share."""

    def __init__(self, limits: Limits, gate: Gate, metrics: HttpMetrics) -> None:
        super().__init__()
        self.limits = limits
        self.gate = gate
        self.metrics = metrics
        self.date = b""
        self.stopping = False

        self._quiet = asyncio.Event()

    def left(self) -> None:
        """A connection has gone."""
        if not self.connections:
            self._quiet.set()

    async def wait_quiet(self, seconds: float) -> None:
        """Until no connection is open, or ``seconds`` have passed."""
        self._quiet.clear()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), seconds)

    def set_date(self, date: bytes) -> None:
        self.date = b"date: %b\r\n" % date
        self.default_headers = [(b"date", date)]


class Refused(Exception):
    """Ends the parser: the answer is :attr:`error`, and the connection closes."""

    def __init__(self, error: HttpError) -> None:
        super().__init__(error.message)
        self.error = error


class Connection(HttpToolsProtocol):
    """One client connection; see the module's description."""

    def __init__(
        self,
        config: Config,
        server_state: Shared,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.shared = server_state
        self.limits = server_state.limits
        self.active: Exchange | None = None
        self.reading = IDLE
        self.since = self.loop.time()
        self._header_size = 0
        self._received = 0
        self._refusal: HttpError | None = None
        self._linger_until: float | None = None
        self._written = 0
        self._drained = 0
        self._stuck_since: float | None = None

    @property
    def busy(self) -> bool:
        return self.active is not None and not self.active.response_complete

    # ---- transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.limits.slow_bytes)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            with contextlib.suppress(OSError, AttributeError):
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOT_SENT_LOW)
        if len(self.connections) > self.limits.connections:
            self.shared.metrics.refused_connections += 1
            message = f"This endpoint serves at most {self.limits.connections} connections; retry later."
            self._refuse(HttpError(503, message, "too_many_connections", headers=retry_after(1)))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pipeline.clear()
        if self.active is not None and self.busy:
            self.shared.metrics.disconnects += 1
            self.active.lost()
        self.shared.left()

    def send_bytes(self, data: bytes) -> None:
        self._written += len(data)
        self.transport.write(data)

    def unread(self) -> int:
        """Bytes that the client has left for us to hold."""
        return self.transport.get_write_buffer_size()

    def cut_slow_reader(self) -> None:
        self.shared.metrics.slow_readers += 1
        self.transport.abort()
        if self.active is not None and self.busy:
            self.active.lost()

    # ---- reading

    def data_received(self, data: bytes) -> None:
        if self._linger_until is not None or self._refusal is not None:
            return  # thrown away: the answer is on its way
        self._unset_keepalive_if_required()
        if self.reading is IDLE:
            self.reading, self.since, self._received = HEADER, self.loop.time(), 0
        if self.reading is HEADER:
            self._received += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(bad("This endpoint speaks HTTP/1.1 only: leave out the Upgrade header.", code="bad_http"))
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, Refused):
                self._refuse(cause.error)
            else:
                if isinstance(error, httptools.HttpParserCallbackError):
                    log.error("a callback of the HTTP parser failed", exc_info=cause)
                self._refuse(bad(f"This is not valid HTTP/1.1: {error}.", code="bad_http"))
        else:
            if self.reading is HEADER and self._received > self.limits.header_bytes:
                self._refuse(self._header_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_size = 0
        if self.reading is not HEADER:  # the next request in the same data
            self.reading, self.since, self._received = HEADER, self.loop.time(), 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_header(len(name) + len(value) + 4)

    def _count_header(self, size: int) -> None:
        self._header_size += size
        if self._header_size > self.limits.header_bytes:
            raise Refused(self._header_too_large())

    def _header_too_large(self) -> HttpError:
        message = f"The request line and headers are longer than {self.limits.header_bytes} bytes; shorten them."
        return HttpError(431, message, "header_too_large")

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            raise Refused(bad("This endpoint speaks HTTP/1.1 only: leave out the Upgrade header.", code="bad_http"))
        version = self.parser.get_http_version()
        scope, fields = self.scope, dict(self.headers)
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["http_version"] = version
        self._set_path()
        self.cycle = exchange = Exchange(
            self,
            fields,
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=version == "1.1" and self.parser.should_keep_alive() and not self.shared.stopping,
            on_response=self.on_response_complete,
        )
        self.reading, self.since, self._received = BODY, self.loop.time(), 0
        error = self._error_before_body(exchange)
        if error is not None:
            raise Refused(error)
        if self.expect_100_continue and not self.busy:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _set_path(self) -> None:
        try:
            url = httptools.parse_url(self.url)
            raw = url.path or b"/"
            path = raw.decode("ascii")
        except (httptools.HttpParserError, UnicodeDecodeError):
            raise Refused(bad("The request target is not a valid path.", code="bad_http")) from None
        self.scope["raw_path"] = raw
        self.scope["path"] = unquote(path) if "%" in path else path
        self.scope["query_string"] = url.query or b""

    def _error_before_body(self, exchange: Exchange) -> HttpError | None:
        fields, method = exchange.fields, exchange.scope["method"]
        error = self.shared.gate.refuse(method, exchange.path, fields)
        if error is not None:
            self.shared.metrics.requests[(self.shared.gate.label(exchange.path), error.status)] += 1
            return error
        length = fields.get(b"content-length")
        if length is not None and int(length) > self.limits.body_bytes:
            return self._body_too_large()
        if method == "POST" and length is None and b"transfer-encoding" not in fields:
            return HttpError(411, "A request with a body needs a Content-Length header.", "length_required")
        if fields.get(b"content-encoding", b"identity").lower() != b"identity":
            return bad("Compressed request bodies are not accepted: leave out Content-Encoding.", "Content-Encoding")
        return None

    def _body_too_large(self) -> HttpError:
        return HttpError(413, f"The body is longer than {self.limits.body_bytes} bytes; shorten it.", "body_too_large")

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        cycle.body += body
        self._received += len(body)
        if len(cycle.body) > self.limits.body_bytes:
            raise Refused(self._body_too_large())

    def on_message_complete(self) -> None:
        self.reading = IDLE
        cycle = cast(Exchange, self.cycle)
        cycle.more_body = False
        cycle.message_event.set()
        if not self.busy:
            self._start_asgi_task(cycle, self.app)
            return
        self.pipeline.appendleft((cycle, self.app))
        if len(self.pipeline) >= self.limits.pipelined:
            self.flow.pause_reading()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self.active = cycle
        super()._start_asgi_task(cycle, app)

    # ---- the end of a request, or of the connection

    def on_response_complete(self) -> None:
        exchange = self.active
        if exchange is not None:
            self.shared.metrics.requests[(self.shared.gate.label(exchange.path), exchange.status)] += 1
        super().on_response_complete()
        if self._refusal is not None and not self.busy:
            refusal, self._refusal = self._refusal, None
            self._refuse(refusal)
        elif self.reading is not IDLE:
            self.since = self.loop.time()  # what came meanwhile has its full time from here

    def _refuse(self, error: HttpError) -> None:
        """Answer and close; behind the requests that came before it, if there are any."""
        if self.transport.is_closing():
            return
        if self.busy:
            self._refusal = error
            return
        body, named = error.body(), b""
        if self.reading is BODY and isinstance(self.cycle, Exchange):  # otherwise it is not known what was asked
            named = self.cycle.identity()
            body = b"" if self.scope["method"] == "HEAD" else body
        size = b"content-length: %d\r\n" % len(body)
        lines = (status_line(error.status), self.shared.date, JSON, size, error.headers, named)
        self.transport.write(b"".join((*lines, b"connection: close\r\n\r\n", body)))
        self._unset_keepalive_if_required()
        self._linger_until = self.loop.time() + self.limits.linger_s
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        if not self.busy and self.reading is IDLE:
            self.transport.close()

    def shutdown(self) -> None:
        """The server stops: idle connections close now, the others behind their answer."""
        if self.active is not None and self.busy:
            self.active.keep_alive = False
        else:
            self.transport.close()

    # ---- deadlines

    def sweep(self, now: float) -> None:
        """Called a few times a second."""
        if self._linger_until is not None:
            if now >= self._linger_until:
                self.transport.abort()
            return
        self._check_reader(now)
        if self.busy:
            return
        limits, elapsed = self.limits, now - self.since
        if self.reading is IDLE:
            if self.active is None and elapsed > limits.header_s:
                self.transport.close()  # it never asked for anything
        elif self.reading is HEADER:
            if elapsed > limits.header_s:
                self._refuse(HttpError(408, f"The headers did not come within {limits.header_s:g} s.", "timeout"))
        elif elapsed > limits.body_s + self._received / limits.body_rate:
            message = f"The body came slower than {limits.body_rate / 1024:g} kB/s."
            self._refuse(HttpError(408, message, "timeout"))

    def _check_reader(self, now: float) -> None:
        """Cut a client that has let data lie unread for too long."""
        unread = self.transport.get_write_buffer_size()
        drained = self._written - unread
        if not unread or drained != self._drained:
            self._stuck_since = now if unread else None
            self._drained = drained
        elif self._stuck_since is not None and now - self._stuck_since > self.limits.slow_s:
            self.cut_slow_reader()
