"""The endpoint's routes: the generation routes go past starlette, the rest through it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pdyn.http.backend import Backend, ModelStatus
from p2pdyn.http.errors import HttpError, unknown_path, wrong_method
from p2pdyn.http.generate import Generations
from p2pdyn.http.keys import ApiKeys
from p2pdyn.http.metrics import HttpMetrics

GENERATIONS = ("/v1/chat/completions", "/v1/completions")
READS = ("/v1/models", "/health", "/live", "/ready", "/metrics", "/p2p/peers")
MODEL = "/v1/models/"
OPEN = ("/health", "/live", "/ready")
"""Need no API key."""

Application = Callable[[Any, Any, Any], Awaitable[None]]


class Gate:
    """What a connection asks before it reads a body: is there such a path and method, and may this client use it."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def refuse(self, method: str, path: str, fields: dict[bytes, bytes]) -> HttpError | None:
        if path not in OPEN and not self._keys.accept(fields.get(b"authorization")):
            message = "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'."
            return HttpError(401, message, "invalid_api_key", headers=b"www-authenticate: Bearer\r\n")
        if path in GENERATIONS:
            return None if method == "POST" else wrong_method(method, "POST")
        if path in READS or path.startswith(MODEL):
            return None if method in ("GET", "HEAD") else wrong_method(method, "GET, HEAD")
        return unknown_path(path)

    def label(self, path: str) -> str:
        if path.startswith(MODEL):
            return MODEL + "{id}"
        return path if path in GENERATIONS or path in READS else "other"


class Endpoint:
    """The ASGI application. ``connections`` says how many are open, for /metrics."""

    def __init__(self, backend: Backend, metrics: HttpMetrics, connections: Callable[[], int]) -> None:
        generations = Generations(backend, metrics)
        self._backend = backend
        self._metrics = metrics
        self._connections = connections
        self._generations: dict[str, Application] = {
            "/v1/chat/completions": generations.chat,
            "/v1/completions": generations.completions,
        }
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{id:path}", self._model),
            Route("/health", self._ready),
            Route("/live", self._live),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics_text),
            Route("/p2p/peers", self._peers),
        ]
        self._app = Starlette(routes=routes, exception_handlers={HttpError: _error})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        direct = self._generations.get(scope["path"])
        if direct is not None:
            await direct(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [_describe(model) for model in self._backend.models()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["id"]
        for model in self._backend.models():
            if model.name == name:
                return _json(_describe(model))
        raise HttpError(
            404, f"The model {name[:128]!r} does not exist here; see /v1/models.", "model_not_found", "model"
        )

    async def _live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def _ready(self, request: Request) -> Response:
        ready, why = self._backend.readiness()
        return _json({"status": "ready" if ready else "not ready", "detail": why}, 200 if ready else 503)

    async def _peers(self, request: Request) -> Response:
        return _json(self._backend.peers())

    async def _metrics_text(self, request: Request) -> Response:
        text = self._metrics.exposition(self._connections(), self._backend.metrics())
        return Response(text, media_type="text/plain; version=0.0.4")


def _json(content: Any, status: int = 200) -> Response:
    headers = {"retry-after": "1"} if status == 503 else None
    return Response(orjson.dumps(content), status, headers, "application/json")


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return Response(error.body(), error.status, media_type="application/json")


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
