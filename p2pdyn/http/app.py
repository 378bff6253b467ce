"""The endpoint's routes, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from p2pdyn.http.backend import Backend, ModelStatus
from p2pdyn.http.errors import HttpError, retry_after, unknown_path, wrong_method
from p2pdyn.http.exchange import Exchange
from p2pdyn.http.explain import Explanations
from p2pdyn.http.generate import Generations, routing
from p2pdyn.http.keys import ApiKeys
from p2pdyn.http.metrics import HttpMetrics
from p2pdyn.http.openai import parse_object

GENERATIONS = ("/v1/chat/completions", "/v1/completions")
EXPLAIN = "/p2p/explain"
READS = ("/v1/models", "/health", "/live", "/ready", "/metrics", "/p2p/peers")
MODEL = "/v1/models/"
OPEN = ("/health", "/live", "/ready")
"""Need no API key."""

PROMETHEUS = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"


class Gate:
    """What a connection asks before it reads a body: is there such a path and method, and may this client use it."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def refuse(self, method: str, path: str, fields: dict[bytes, bytes]) -> HttpError | None:
        if self._keys.required and path not in OPEN and not self._keys.accept(fields.get(b"authorization")):
            message = "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'."
            return HttpError(401, message, "invalid_api_key", headers=b"www-authenticate: Bearer\r\n")
        if path in GENERATIONS:
            return None if method == "POST" else wrong_method(method, "POST")
        if path == EXPLAIN:
            return None if method == "POST" else wrong_method(method, "POST")
        if path in READS or path.startswith(MODEL):
            return None if method in ("GET", "HEAD") else wrong_method(method, "GET, HEAD")
        return unknown_path(path)

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
        self._routes: dict[str, Callable[[Exchange], None]] = {
            "/v1/chat/completions": self.generations.chat,
            "/v1/completions": self.generations.completions,
            "/v1/models": self._models,
            "/health": self._ready,
            "/live": self._live,
            "/ready": self._ready,
            "/metrics": self._metrics_text,
            "/p2p/peers": self._peers,
            EXPLAIN: self._explain,
        }

    def serve(self, exchange: Exchange) -> None:
        """Answer, at once or later; what goes wrong is an answer too."""
        try:
            self._routes.get(exchange.path, self._model)(exchange)
        except Exception as error:
            exchange.broke(error)

    def _models(self, exchange: Exchange) -> None:
        _json(exchange, {"object": "list", "data": [_describe(model) for model in self._backend.models()]})

    def _model(self, exchange: Exchange) -> None:
        name = exchange.path.removeprefix(MODEL)
        for model in self._backend.models():
            if model.name == name:
                return _json(exchange, _describe(model))
        raise HttpError(
            404, f"The model {name[:128]!r} does not exist here; see /v1/models.", "model_not_found", "model"
        )

    def _live(self, exchange: Exchange) -> None:
        _json(exchange, {"status": "live"})

    def _ready(self, exchange: Exchange) -> None:
        ready, why = self._backend.readiness()
        _json(exchange, {"status": "ready" if ready else "not ready", "detail": why}, 200 if ready else 503)

    def _peers(self, exchange: Exchange) -> None:
        _json(exchange, self._backend.peers())

    def _explain(self, exchange: Exchange) -> None:
        content = parse_object(exchange.body)
        pin, session = routing(exchange.fields)
        answer = self.explanations.request(content, pin=pin, session=session)

        async def rest() -> None:
            _json(exchange, await answer)

        self.generations.later(exchange, rest())

    def _metrics_text(self, exchange: Exchange) -> None:
        text = self._metrics.exposition(self._connections(), self._backend.metrics())
        exchange.respond(200, text, kind=PROMETHEUS)


def _json(exchange: Exchange, content: Any, status: int = 200) -> None:
    exchange.respond(status, orjson.dumps(content), retry_after(1) if status == 503 else b"")


def _describe(model: ModelStatus) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.since,
        "owned_by": "p2pdyn",
        "ready_workers": model.ready,
        "context_window": model.context,
        "block_size": model.block_size,
    }
