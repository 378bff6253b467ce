"""One generation as the frontend sees it: the job, where its tokens go, how it ends."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from p2pdyn.core.types import NodeId, SamplingParams

Logprobs = Sequence[tuple[float, Sequence[tuple[int, float]]]]
"""One ``(chosen logprob, ((token id, logprob), ...))`` a token."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request cannot go on, in the terms of the HTTP answer. ``retry_after`` is in whole seconds."""

    status: int
    code: str
    message: str
    retry_after: int | None = None


class Rejected(Exception):
    """Raised when a request is not accepted at all."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(slots=True)
class Job:
    """One sequence to generate: prompt token ids (u32), validated parameters, routing wishes.

    ``resumable`` is False for what another worker could not continue exactly (penalties, guided decoding, logprobs).
    ``client`` names whose request it is, for a fair queue.
    ``whole``: the client waits for the end and nothing depends on single tokens, so they may come in larger parts.
    """

    model: str
    tokens: array[int]
    params: SamplingParams
    resumable: bool = True
    pin: str = ""
    session: str = ""
    request_id: str = ""
    traceparent: str = ""
    whole: bool = False
    client: str = ""


class Outcome(NamedTuple):
    """How a job ended. ``finish`` is stop, length, cancelled or error; ``failure`` is set exactly when it is error."""

    finish: str
    workers: tuple[NodeId, ...]
    migrations: int = 0
    failure: Failure | None = None


class Sink(Protocol):
    """Where a job's tokens go. Called on the event loop; must neither block nor raise."""

    def on_routed(self, worker: NodeId) -> None:
        """A worker has been chosen (again, after a migration)."""

    def on_tokens(self, tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None:
        """Token ids in order, never a repeat. ``cached`` counts prompt tokens from the prefix cache, else 0."""

    def on_end(self, outcome: Outcome) -> None:
        """Exactly once, and last, unless the job was cancelled by its own ticket."""
