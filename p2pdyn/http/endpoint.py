"""What may be asked, and who answers it: the generation routes at once, all others as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from p2pdyn.http.backend import Backend
from p2pdyn.http.errors import HttpError, retry_after, unknown_path, wrong_method
from p2pdyn.http.exchange import Exchange
from p2pdyn.http.explain import Explanations
from p2pdyn.http.generate import Generations
from p2pdyn.http.keys import ApiKeys, presented
from p2pdyn.http.metrics import HttpMetrics
from p2pdyn.http.turns import Turns

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from p2pdyn.http.cycle import Cycle

GENERATIONS = ("/v1/chat/completions", "/v1/completions")
EXPLAIN = "/p2p/explain"
READS = ("/v1/models", "/health", "/live", "/ready", "/metrics", "/p2p/peers")
MODEL = "/v1/models/"
OPEN = ("/health", "/live", "/ready")
"""Need no API key."""


class Gate:
    """What a connection asks before it reads a body: is there such a path and method, and may this client use it."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys
        self.draining = False
        """This endpoint is to go: no generation is let in."""

    def refuse(self, method: str, path: str, fields: dict[bytes, bytes]) -> HttpError | None:
        if self._keys.required and path not in OPEN and not self._keys.accept(fields.get(b"authorization")):
            message = "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'."
            return HttpError(401, message, "invalid_api_key", headers=b"www-authenticate: Bearer\r\n")
        if path in GENERATIONS:
            if self.draining and method == "POST":
                message = "This endpoint is draining and takes no new requests: use another one, or retry in a moment."
                return HttpError(503, message, "draining", headers=retry_after(1))
            return None if method == "POST" else wrong_method(method, "POST")
        if path == EXPLAIN:
            return None if method == "POST" else wrong_method(method, "POST")
        if path in READS or path.startswith(MODEL):
            return None if method in ("GET", "HEAD") else wrong_method(method, "GET, HEAD")
        return unknown_path(path)

    def client(self, host: str, fields: dict[bytes, bytes]) -> str:
        return "key " + presented(fields.get(b"authorization")) if self._keys.required else host

    def label(self, path: str) -> str:
        if path.startswith(MODEL):
            return MODEL + "{id}"
        return path if path in GENERATIONS or path in READS or path == EXPLAIN else "other"


class Endpoint:
    """Answers requests that the gate let through. ``connections`` says how many are open, for /metrics."""

    def __init__(self, backend: Backend, metrics: HttpMetrics, connections: Callable[[], int]) -> None:
        self.generations = Generations(backend, metrics)
        self.explanations = Explanations(backend, self.generations.speeches)
        self._backend = backend
        self._metrics = metrics
        self._connections = connections
        self._hot: dict[str, Callable[[Exchange], None]] = {
            "/v1/chat/completions": self.generations.chat,
            "/v1/completions": self.generations.completions,
        }
        self._asgi: tuple[type[Cycle], Starlette] | None = None
        self._turns = Turns(asyncio.get_running_loop(), self._generate)

    def serve(self, exchange: Exchange) -> None:
        """Answer, at once or later; what goes wrong is an answer too."""
        if exchange.path in self._hot:
            self._turns(exchange)
        else:
            self.generations.later(exchange, self._run(exchange))

    def _generate(self, exchange: Exchange) -> None:
        if exchange.disconnected:  # while it waited for its turn
            return
        try:
            self._hot[exchange.path](exchange)
        except Exception as error:
            exchange.broke(error)

    async def _run(self, exchange: Exchange) -> None:
        if self._asgi is None:
            self._asgi = await asyncio.to_thread(self._load)
        cycle, app = self._asgi
        if not exchange.disconnected:
            await cycle(exchange).run_asgi(app)

    def _load(self) -> tuple[type[Cycle], Starlette]:
        """In a thread, at the first request that needs them: starlette and uvicorn take a quarter of a second, and
        5 MB that a peer whose endpoint nobody uses saves."""
        from p2pdyn.http.app import application
        from p2pdyn.http.cycle import Cycle

        return Cycle, application(self._backend, self._metrics, self.explanations, self._connections)
