"""What the HTTP endpoint needs from the mesh; :class:`p2pdyn.net.dispatch.Dispatcher` is it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from p2pdyn.core.request import Job, Sink
from p2pdyn.http.metrics import Histogram
from p2pdyn.text.card import ModelCard

Metric = tuple[str, str, str, list[tuple[dict[str, str], float]]]
"""(name, type, help, [(labels, value)])."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model known to this peer: ``ready`` counts the workers that take requests, ``since`` is wall-clock seconds."""

    name: str
    ready: int
    block_size: int
    context: int
    since: int


class Backend(Protocol):
    """All on the event loop."""

    on_batch: Callable[[], None]
    """Set by the endpoint; called when all tokens that had come have been handed to their sinks."""

    def models(self) -> list[ModelStatus]:
        """Every known model; a model stays known for ten minutes after its last worker left."""

    def context(self, model: str) -> int:
        """Tokens that prompt and output of this model may have together; 0 if the model is not known."""

    def known_card(self, model: str) -> ModelCard | None:
        """The model's card if it is cached; otherwise :meth:`card` says more."""

    async def card(self, model: str) -> ModelCard:
        """The model's card, cached by hash, else fetched from a worker.

        Raises Rejected: 404 model_not_found for a model never seen, 503 no_ready_worker for one without a ready worker.
        """

    def submit(self, job: Job, sink: Sink) -> int:
        """Route and start a job; the number returned cancels it. Raises Rejected (429, 503, 404)."""

    def cancel(self, ticket: int) -> None:
        """Stop a job: the worker hears of it at once, the sink hears nothing more. Unknown tickets are ignored."""

    def peers(self) -> dict[str, Any]:
        """The body of ``GET /p2p/peers``."""

    def readiness(self) -> tuple[bool, str]:
        """Whether this peer can serve, and a sentence that says why not."""

    def explain(self, job: Job) -> dict[str, Any] | None:
        """Where ``job`` would go now and why, the body of `/p2p/explain`; None if nobody may take it."""

    def metrics(self) -> list[Metric | Histogram]:
        """The mesh's own counters, gauges and histograms, for /metrics."""
