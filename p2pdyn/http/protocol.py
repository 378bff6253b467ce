"""The connection: httptools' parser with limits, early refusals and JSON errors.

A request is handed on when its body is complete, out of the turn of the loop that brought its last byte; before the
body is read, the gate has seen path, method and headers (404, 405, 401, 411, 413).  Requests that come behind one that
is not answered yet wait.  Each phase has a deadline, kept by one sweep over all connections instead of a timer each; an
error on any level is JSON; a refused client may still read its answer while it sends (the connection lingers
half-closed).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import unquote

import httptools

from p2pdyn.core.share import Share
from p2pdyn.http.clients import host_of
from p2pdyn.http.descriptors import Descriptors
from p2pdyn.http.errors import HttpError, bad, retry_after
from p2pdyn.http.exchange import JSON, STATUS_LINE, Exchange
from p2pdyn.http.metrics import HttpMetrics
from p2pdyn.http.settings import Limits

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl

log = logging.getLogger(__name__)

NOT_SENT_LOW = 64 * 1024
"""Bytes that the kernel may hold unsent: beyond it they stay, counted, with us (TCP_NOTSENT_LOWAT)."""

MAX_PIECES, PIECE = 4096, 256
"""A body may come in this many pieces, and in one more for each PIECE bytes: a chunk costs 3 us, and a million of one
byte come in one turn of the loop."""

SINGLE = frozenset({b"host", b"content-length", b"transfer-encoding", b"content-encoding", b"authorization"})
"""Headers that a proxy before us might read otherwise if there were two."""

PLAIN_PATH = re.compile(rb"(?:/[a-z0-9]+)+")

GREED = 3
"""One host may hold three times as many connections, and bytes of requests, as are free: three fourths if it is alone.
Many stand behind one proxy, so it is more than in the queue for workers."""

MAX_RETRY_S, BODIES_S = 30, 2
"""Longest Retry-After of a refused connection; and that of a body for which there is no room (bodies of some kB come
within a second, and what they hold is free with their answer)."""

IDLE, HEADER, BODY = "idle", "header", "body"


class Gate(Protocol):
    """Looks at a request before its body is read."""

    def refuse(self, method: str, path: str, fields: dict[bytes, bytes]) -> HttpError | None:
        """Why the request is not read any further, if so."""

    def client(self, host: str, fields: dict[bytes, bytes]) -> str:
        """Whose a request from ``host`` is, where clients share something."""

    def label(self, path: str) -> str:
        """The path as metrics name it: one of a few."""


class Shared:
    """What all connections of one server share. ``serve`` answers a request, now or later, and never raises."""

    def __init__(self, limits: Limits, gate: Gate, metrics: HttpMetrics, serve: Callable[[Exchange], None]) -> None:
        self.limits = limits
        self.gate = gate
        self.metrics = metrics
        self.serve = serve
        self.connections: set[Connection] = set()
        self.places = Share(limits.connections, GREED)
        """Connections, by host; those that were refused have none."""
        self.bodies = Share(limits.held_bytes, GREED)
        """Bytes of requests that are read or answered, by host."""
        self.descriptors = Descriptors(limits.spare_descriptors)
        self.left_at = 0.0
        """When the last connection that had a place went."""
        self.set_date("")
        self.stopping = False
        self._quiet = asyncio.Event()

    def set_date(self, date: str) -> None:
        """The Date of the answers from now on, RFC 9110 5.6.7."""
        self.date = b"date: %b\r\n" % date.encode()
        self.default_headers = [(b"date", date.encode())]

    def came(self, connection: Connection, descriptor: int, now: float) -> HttpError | None:
        """A connection is there, on ``descriptor``; why it is refused, if so."""
        self.connections.add(connection)
        if self.descriptors.short(descriptor, now):
            message = f"This endpoint is out of file descriptors (limit {self.descriptors.limit}); retry later."
            return HttpError(503, message, "out_of_descriptors", headers=self._when_one_leaves(now))
        host, most = connection.host, self.limits.connections
        if self.places.allows(host):
            self.places.take(host)
            connection.placed = True
            return None
        mine = self.places.of(host)
        message = f"This endpoint serves at most {most} connections; retry later."
        if self.places.free > 0:
            message = f"{mine} of the {most} connections that this endpoint serves are yours; use them again, or retry."
        return HttpError(503, message, "too_many_connections", headers=self._when_one_leaves(now))

    def _when_one_leaves(self, now: float) -> bytes:
        """Retry-After: the longer nobody has left, the longer it will take."""
        return retry_after(min(MAX_RETRY_S, max(1, round(now - self.left_at)))) if self.left_at else retry_after(1)

    def left(self, connection: Connection, now: float) -> None:
        """A connection has gone."""
        self.connections.discard(connection)
        if connection.placed:
            self.places.give(connection.host)
            self.left_at = now
        if connection.held:
            self.bodies.give(connection.host, connection.held)
        if not self.connections:
            self._quiet.set()

    async def wait_quiet(self, seconds: float) -> None:
        """Until no connection is open, or ``seconds`` have passed."""
        self._quiet.clear()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), seconds)


class Refused(Exception):
    """Ends the parser: the answer is :attr:`error`, and the connection closes."""

    def __init__(self, error: HttpError) -> None:
        super().__init__(error.message)
        self.error = error


class Connection(asyncio.Protocol):
    """One client connection; see the module's description."""

    transport: asyncio.Transport

    def __init__(self, shared: Shared, loop: asyncio.AbstractEventLoop) -> None:
        self.shared = shared
        self.limits = shared.limits
        self.active: Exchange | None = None
        """The request that is being answered."""
        self.flow: FlowControl | None = None
        """Holds the application back that answers it, if one does, while the client does not read."""
        self.host = ""
        self.placed = False
        """It has one of the endpoint's places."""
        self.held = 0
        """Bytes of bodies that are counted for it."""
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Exchange] = deque()
        """Complete requests behind it."""
        self._incoming: Exchange | None = None
        """The request whose body is being read."""
        self._url = b""
        self._fields: dict[bytes, bytes] = {}
        self._asked = self._serving = self._paused = self._full = False
        self.reading = IDLE
        self.since = loop.time()
        self._header_size = 0
        self._received = self._pieces = 0
        self._refusal: HttpError | None = None
        self._linger_until: float | None = None
        self._written = self._drained = 0
        self._stuck_since = self.since
        self._mark = 0
        """So much has to be read by ``_read_by``."""
        self._read_by = 0.0

    # ---- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(high=self.limits.slow_bytes)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            with contextlib.suppress(OSError, AttributeError):
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOT_SENT_LOW)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer)
        self.host = host_of(transport.get_extra_info("peername"))
        refusal = self.shared.came(self, raw.fileno() if raw is not None else -1, self._loop.time())
        if refusal is not None:
            self.shared.metrics.refused_connections += 1
            self._refuse(refusal)
            if len(self.shared.connections) > 2 * self.limits.connections or refusal.code == "out_of_descriptors":
                transport.close()  # too many even to let them read why in peace

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.clear()
        active, self.active = self.active, None
        if active is not None:
            self.shared.metrics.disconnects += 1
            active.lost()
        self.shared.left(self, self._loop.time())
        del self._parser  # it refers back to its connection

    def send_bytes(self, data: bytes) -> None:
        self._written += len(data)
        self.transport.write(data)

    def pause_writing(self) -> None:
        self._full = True
        if self.flow is not None:
            self.flow.pause_writing()

    def resume_writing(self) -> None:
        self._full = False
        if self.flow is not None:
            self.flow.resume_writing()

    def is_full(self) -> bool:
        """Whether the transport has asked for patience."""
        return self._full

    def is_far_behind(self) -> bool:
        """Whether the client has left more for us to hold than it may."""
        return self._full and self.transport.get_write_buffer_size() > self.limits.slow_bytes

    def cut_slow_reader(self) -> None:
        self.shared.metrics.slow_readers += 1
        self.transport.abort()
        if self.active is not None:
            self.active.lost()

    # ---- reading

    def data_received(self, data: bytes) -> None:
        if self._linger_until is not None or self._refusal is not None:
            return  # thrown away: the answer is on its way
        if self.reading is IDLE:
            self.reading, self.since, self._received = HEADER, self._loop.time(), 0
        if self.reading is HEADER:
            self._received += len(data)
        error = self._parse(data)
        if self._waiting:
            self._serve()
        if error is not None:
            self._refuse(error)

    def _parse(self, data: bytes) -> HttpError | None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return bad("This endpoint speaks HTTP/1.1 only: leave out the Upgrade header.", code="bad_http")
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, Refused):
                return cause.error
            if isinstance(error, httptools.HttpParserCallbackError):
                log.error("a callback of the HTTP parser failed", exc_info=cause)
            return bad(f"This is not valid HTTP/1.1: {error}.", code="bad_http")
        if self.reading is HEADER and self._received > self.limits.header_bytes:
            return self._header_too_large()
        return None

    def on_message_begin(self) -> None:
        self._url, self._fields = b"", {}
        self._header_size = 0
        if self.reading is not HEADER:  # the next request in the same data
            self.reading, self.since, self._received = HEADER, self._loop.time(), 0

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._header_size += len(url)
        if self._header_size > self.limits.header_bytes:
            raise Refused(self._header_too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.reading is not BODY:  # else it is a trailer: its size counts, its meaning is none
            name = name.lower()
            if name in SINGLE and name in self._fields:
                raise Refused(bad(f"The header {name.decode('ascii')} is there twice: send it once.", code="bad_http"))
            self._fields[name] = value
        self._header_size += len(name) + len(value) + 4
        if self._header_size > self.limits.header_bytes:
            raise Refused(self._header_too_large())

    def _header_too_large(self) -> HttpError:
        message = f"The request line and headers are longer than {self.limits.header_bytes} bytes; shorten them."
        return HttpError(431, message, "header_too_large")

    def on_headers_complete(self) -> None:
        parser, shared = self._parser, self.shared
        if parser.should_upgrade():
            raise Refused(bad("This endpoint speaks HTTP/1.1 only: leave out the Upgrade header.", code="bad_http"))
        version, method = parser.get_http_version(), parser.get_method().decode("ascii")
        if version not in ("1.1", "1.0"):
            raise Refused(bad(f"This endpoint speaks HTTP/1.1 and 1.0, not {version}.", code="bad_http"))
        keep_alive = version == "1.1" and parser.should_keep_alive() and not shared.stopping
        self._incoming = Exchange(self, method, self._url, _path(self._url), self._fields, version, keep_alive)
        self.reading, self.since, self._received, self._pieces = BODY, self._loop.time(), 0, 0
        error = self._error_before_body(self._incoming)
        if error is not None:
            raise Refused(error)
        invited = self._fields.get(b"expect", b"").lower() == b"100-continue"
        if invited and self.active is None and not self._waiting:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _error_before_body(self, exchange: Exchange) -> HttpError | None:
        fields, method = exchange.fields, exchange.method
        error = self.shared.gate.refuse(method, exchange.path, fields)
        if error is not None:
            self.shared.metrics.requests[(self.shared.gate.label(exchange.path), error.status)] += 1
            return error
        coding = fields.get(b"transfer-encoding")
        if coding is not None and coding.lower() != b"chunked":
            return bad("The only Transfer-Encoding that is understood is chunked.", code="bad_http")
        length = fields.get(b"content-length")
        if length is not None and int(length) > self.limits.body_bytes:
            return self._body_too_large()
        if method == "POST" and length is None and coding is None:
            return HttpError(411, "A request with a body needs a Content-Length header.", "length_required")
        if fields.get(b"content-encoding", b"identity").lower() != b"identity":
            return bad("Compressed request bodies are not accepted: leave out Content-Encoding.", "Content-Encoding")
        return None

    def _body_too_large(self) -> HttpError:
        return HttpError(413, f"The body is longer than {self.limits.body_bytes} bytes; shorten it.", "body_too_large")

    def on_body(self, body: bytes) -> None:
        exchange = self._incoming
        assert exchange is not None
        if not exchange.body:
            exchange.body = body
        elif isinstance(exchange.body, bytearray):
            exchange.body += body
        else:
            exchange.body = bytearray(exchange.body + body)
        size = len(body)
        self._received += size
        exchange.size += size
        self._pieces += 1
        if self._pieces > MAX_PIECES + exchange.size // PIECE:
            raise Refused(
                bad(f"The body comes in chunks of less than {PIECE} bytes; send larger ones.", code="bad_http")
            )
        if exchange.size > self.limits.body_bytes:
            raise Refused(self._body_too_large())
        bodies = self.shared.bodies
        if not bodies.allows(self.host, size):
            message = f"The requests that this endpoint holds have {bodies.total // 2**20} MB already; retry later."
            raise Refused(HttpError(503, message, "overloaded", headers=retry_after(BODIES_S)))
        bodies.take(self.host, size)
        self.held += size

    def on_message_complete(self) -> None:
        self.reading = IDLE
        self._asked = True
        exchange, self._incoming = self._incoming, None
        assert exchange is not None
        self._waiting.append(exchange)
        if len(self._waiting) >= self.limits.pipelined and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def _serve(self) -> None:
        """Hand on what waits, until a request is not answered at once."""
        if self._serving:
            return
        self._serving = True
        waiting = self._waiting
        while waiting and self.active is None and not self.transport.is_closing():
            self.active = waiting.popleft()
            self.shared.serve(self.active)
        self._serving = False
        if self._paused and len(waiting) < self.limits.pipelined and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    @property
    def busy(self) -> bool:
        """A request has passed the gate and its answer is not complete."""
        asked = self._incoming is not None and self._linger_until is None
        return self.active is not None or bool(self._waiting) or asked

    # ---- the end of a request, or of the connection

    def answered(self, exchange: Exchange) -> None:
        """The last byte of an answer has been written."""
        shared = self.shared
        shared.metrics.requests[(shared.gate.label(exchange.path), exchange.status)] += 1
        self.active = None
        if exchange.size:
            shared.bodies.give(self.host, exchange.size)
            self.held -= exchange.size
        if not exchange.keep_alive:
            self.transport.close()
            return
        self.since = self._loop.time()  # what comes, or came meanwhile, has its full time from here
        if self._waiting:
            self._serve()
        if self._refusal is not None and self.active is None and not self._waiting:
            refusal, self._refusal = self._refusal, None
            self._refuse(refusal)

    def _refuse(self, error: HttpError) -> None:
        """Answer and close; behind the requests that came before it, if there are any."""
        if self.transport.is_closing():
            return
        if self.active is not None:
            self._refusal = error
            return
        body, named = error.body(), b""
        if self.reading is BODY and self._incoming is not None:  # otherwise it is not known what was asked
            named = self._incoming.identity()
            body = b"" if self._incoming.method == "HEAD" else body
        size = b"content-length: %d\r\n" % len(body)
        lines = (STATUS_LINE[error.status], self.shared.date, JSON, size, error.headers, named)
        self.transport.write(b"".join((*lines, b"connection: close\r\n\r\n", body)))
        self._linger_until = self._loop.time() + self.limits.linger_s
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """The server stops: idle connections close now, the others behind their answer."""
        if self.active is not None:
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
        if self.active is not None:
            return
        limits, elapsed = self.limits, now - self.since
        if self.reading is IDLE:
            if elapsed > (limits.idle_s if self._asked else limits.header_s):
                self.transport.close()
        elif self.reading is HEADER:
            if elapsed > limits.header_s:
                self._refuse(HttpError(408, f"The headers did not come within {limits.header_s:g} s.", "timeout"))
        elif elapsed > limits.body_s + self._received / limits.body_rate:
            message = f"The body came slower than {limits.body_rate / 1024:g} kB/s."
            self._refuse(HttpError(408, message, "timeout"))

    def _check_reader(self, now: float) -> None:
        """Cut a client that reads nothing for ``slow_s``, or what has come together slower than ``read_rate``."""
        unread = self.transport.get_write_buffer_size()
        drained = self._written - unread
        if drained >= self._mark:
            self._mark = self._written
            self._read_by = now + self.limits.slow_s + unread / self.limits.read_rate
        if drained != self._drained or not unread:
            self._drained, self._stuck_since = drained, now
        elif now - self._stuck_since > self.limits.slow_s:
            self.cut_slow_reader()
            return
        if now > self._read_by:
            self.cut_slow_reader()


def _path(url: bytes) -> str:
    """The path of a request target, unescaped. Raises Refused."""
    if PLAIN_PATH.fullmatch(url):
        return url.decode()
    try:
        path = (httptools.parse_url(url).path or b"/").decode("ascii")
    except (httptools.HttpParserError, UnicodeDecodeError):
        raise Refused(bad("The request target is not a valid path.", code="bad_http")) from None
    return unquote(path) if "%" in path else path
