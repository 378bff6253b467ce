"""Binds the endpoint, sweeps its connections, and stops it."""

from __future__ import annotations

import asyncio
import errno
import ssl
from dataclasses import replace
from email.utils import formatdate
from typing import Any

from p2pdyn.core.request import Rejected
from p2pdyn.core.types import Address
from p2pdyn.http.backend import Backend
from p2pdyn.http.descriptors import descriptor_limit
from p2pdyn.http.endpoint import Endpoint, Gate
from p2pdyn.http.errors import HttpError
from p2pdyn.http.keys import ApiKeys
from p2pdyn.http.metrics import HttpMetrics
from p2pdyn.http.protocol import Connection, Shared
from p2pdyn.http.settings import HttpSettings, Limits

__all__ = ["HttpServer", "HttpSettings", "Limits"]

BACKLOG = 1024
SWEEP_S = 0.5
"""Between two looks at all connections (4096 of them take 2 ms); shorter deadlines are swept for more often."""
FORMS = ("auto", "chat", "completion")
STOP_S = 1.0
"""For closed connections and cancelled tasks to be gone."""


class HttpServer:
    """One HTTP or HTTPS endpoint on the running loop; all methods are called there."""

    def __init__(self, backend: Backend, settings: HttpSettings) -> None:
        """Raises ValueError or OSError, with the mend, for key and certificate files that cannot be used."""
        self._settings = settings
        self._keys = ApiKeys(settings.api_key_file)
        self._tls = _tls_context(settings)
        self.metrics = HttpMetrics()
        self._endpoint = Endpoint(backend, self.metrics, lambda: len(self._shared.connections))
        self._gate = Gate(self._keys)
        self._shared = Shared(_within_descriptors(settings.limits), self._gate, self.metrics, self._endpoint.serve)
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_s = SWEEP_S

    async def start(self) -> str:
        """Bind, and answer the endpoint's URL. Raises OSError whose ``strerror`` says why it cannot bind."""
        loop = asyncio.get_running_loop()
        address, limits = self._settings.address, self._shared.limits
        try:
            self._server = await loop.create_server(
                lambda: Connection(self._shared, loop), address.host, address.port, ssl=self._tls, backlog=BACKLOG
            )
        except OSError as error:
            raise _bind_error(error) from error
        shortest = min(limits.header_s, limits.body_s, limits.idle_s, limits.linger_s, limits.slow_s)
        self._sweep_s = min(SWEEP_S, shortest / 4)
        self._sweep()
        port = self._server.sockets[0].getsockname()[1]
        return f"{'https' if self._tls else 'http'}://{Address(address.host, port)}"

    def reload(self) -> None:
        """Read keys and certificate again: for new requests and new connections. Raises as the constructor does."""
        self._keys.reload()
        if self._tls is not None:
            _tls_context(self._settings)  # a pair that does not fit must not replace the one in use
            self._tls.load_cert_chain(*_pair(self._settings))

    async def explain(self, args: dict[str, Any]) -> dict[str, Any]:
        """The admin operation "explain": prompt, and perhaps model and form (auto, chat, completion). Raises ValueError
        with a sentence."""
        prompt, model, form = args.get("prompt"), args.get("model"), args.get("form") or "auto"
        if not isinstance(prompt, str) or not isinstance(model, str | None) or form not in FORMS:
            raise ValueError("explain needs a prompt, and takes a model and a form: auto, chat or completion")
        try:
            return await self._endpoint.explanations.prompt(prompt, model, form)
        except HttpError as error:
            raise ValueError(error.message) from error
        except Rejected as error:
            raise ValueError(error.failure.message) from error

    @property
    def open(self) -> int:
        """Requests that are being answered, or read."""
        return sum(connection.busy for connection in self._shared.connections)

    def drain(self) -> None:
        """Refuse new generations; every connection closes behind its next answer. What is open goes on."""
        self._gate.draining = self._shared.stopping = True
        for connection in self._shared.connections:
            if connection.active is not None:
                connection.active.keep_alive = False

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, let open answers end for ``grace_s``, then close all. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        shared = self._shared
        shared.stopping = True
        server.close()
        for connection in list(shared.connections):
            connection.shutdown()
        await shared.wait_quiet(grace_s)
        for connection in list(shared.connections):
            connection.transport.abort()
        await self._endpoint.generations.close(STOP_S)
        await shared.wait_quiet(STOP_S)
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._shared.set_date(formatdate(usegmt=True))
        self._shared.descriptors.look(now)
        for connection in list(self._shared.connections):
            connection.sweep(now)
        self._sweeper = loop.call_later(self._sweep_s, self._sweep)


def _within_descriptors(limits: Limits) -> Limits:
    """No more connections than the process may have descriptors beside those that are the mesh's."""
    allowed = descriptor_limit()
    spare = min(limits.spare_descriptors, allowed // 4)
    return replace(limits, connections=min(limits.connections, allowed - spare), spare_descriptors=spare)


def _pair(settings: HttpSettings) -> tuple[Any, Any]:
    return settings.tls_cert, settings.tls_key


def _tls_context(settings: HttpSettings) -> ssl.SSLContext | None:
    cert, key = _pair(settings)
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ValueError("TLS needs both --tls-cert and --tls-key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"the TLS certificate {cert} or its key {key} cannot be used: {error}") from error
    return context


def _bind_error(error: OSError) -> OSError:
    reasons = {
        errno.EADDRINUSE: "the port is taken",
        errno.EADDRNOTAVAIL: "this host has no such address",
        errno.EACCES: "ports below 1024 need privileges",
    }
    code = error.errno or 0
    return OSError(code, reasons.get(code, error.strerror or str(error)))
