"""The routes that generate nothing, as a starlette application. The gate has seen path, method and key before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pdyn.core.request import Rejected
from p2pdyn.http.backend import Backend, ModelStatus
from p2pdyn.http.errors import HttpError, internal, retry_after, unknown_path
from p2pdyn.http.explain import Explanations
from p2pdyn.http.generate import routing
from p2pdyn.http.jsonbody import load_object
from p2pdyn.http.metrics import HttpMetrics

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def application(
    backend: Backend, metrics: HttpMetrics, explanations: Explanations, connections: Callable[[], int]
) -> Starlette:
    """``connections`` says how many are open, for /metrics."""
    routes = _Routes(backend, metrics, explanations, connections)
    app = Starlette(
        routes=[
            Route("/v1/models", routes.models),
            Route("/v1/models/{id:path}", routes.model),
            Route("/health", routes.ready),
            Route("/live", routes.live),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
            Route("/p2p/peers", routes.peers),
            Route("/p2p/explain", routes.explain, methods=["POST"]),
        ],
        exception_handlers={HttpError: _refused, Rejected: _refused, HTTPException: _unknown, Exception: _broken},
    )
    app.router.redirect_slashes = False
    return app


class _Routes:
    def __init__(
        self, backend: Backend, metrics: HttpMetrics, explanations: Explanations, connections: Callable[[], int]
    ) -> None:
        self._backend = backend
        self._metrics = metrics
        self._explanations = explanations
        self._connections = connections

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [_describe(model) for model in self._backend.models()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        for model in self._backend.models():
            if model.name == name:
                return _json(_describe(model))
        raise HttpError(
            404, f"The model {name[:128]!r} does not exist here; see /v1/models.", "model_not_found", "model"
        )

    async def live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        ready, why = self._backend.readiness()
        content = {"status": "ready" if ready else "not ready", "detail": why}
        return _json(content) if ready else _json(content, 503, retry_after(1))

    async def peers(self, request: Request) -> Response:
        return _json(self._backend.peers())

    async def explain(self, request: Request) -> Response:
        content = load_object(await request.body())
        pin, session = routing(dict(request.headers.raw))
        return _json(await self._explanations.request(content, pin=pin, session=session))

    async def metrics(self, request: Request) -> Response:
        text = self._metrics.exposition(self._connections(), self._backend.metrics())
        return Response(text, media_type=PROMETHEUS)


def _json(content: Any, status: int = 200, headers: bytes = b"") -> Response:
    return _answer(status, orjson.dumps(content), headers)


def _answer(status: int, body: bytes, headers: bytes) -> Response:
    """``headers`` are lines, each with its CRLF."""
    response = Response(body, status, media_type="application/json")
    for line in headers.splitlines():
        name, _, value = line.partition(b": ")
        response.raw_headers.append((name, value))
    return response


async def _refused(request: Request, error: Exception) -> Response:
    refusal = HttpError.of(error.failure) if isinstance(error, Rejected) else error
    assert isinstance(refusal, HttpError)
    return _answer(refusal.status, refusal.body(), refusal.headers)


async def _unknown(request: Request, error: Exception) -> Response:
    """Starlette knows no route for what the gate let through: a model's name with a line break in it."""
    return await _refused(request, unknown_path(request.url.path))


async def _broken(request: Request, error: Exception) -> Response:
    """Starlette raises ``error`` again behind this answer; then uvicorn logs it and closes the connection."""
    return _answer(500, internal().body(), b"connection: close\r\n")


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
