"""One request of a frontend, and what its shell is told to do for it: pieces of :mod:`p2pdyn.core.flight`."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from p2pdyn.core.request import Job, Sink
from p2pdyn.core.router import Decision
from p2pdyn.core.router_target import Target
from p2pdyn.core.types import NodeId, only_pulls


class Transfer(NamedTuple):
    """The first ``blocks`` KV blocks are at ``source``, held under ``lease``, or with lease 0 in its prefix cache.
    ``epoch`` is the source's, 0 if the shell is to fill in the present one; ``remote`` as in
    :class:`~p2pdyn.wire.requests.Prefilled`."""

    source: NodeId
    epoch: int
    lease: int
    blocks: int
    remote: bytes = b""


class Dispatch(NamedTuple):
    """Send ``tokens`` (prompt and output so far) to ``worker`` as this attempt."""

    worker: NodeId
    rid: int
    attempt: int
    job: Job
    tokens: array[int]
    rank: int = 0
    uncached: int = 0
    """Tokens that the worker is expected to compute."""
    hand_over: bool = False
    """Compute only, and answer Prefilled."""
    transfer: Transfer | None = None
    """Take these blocks first."""


class Abandon(NamedTuple):
    """Tell ``worker`` to stop (rid, attempt), and to hold no blocks for it."""

    worker: NodeId
    rid: int
    attempt: int


Action = Dispatch | Abandon


class Lent(NamedTuple):
    """What a prefill worker holds for a flight since it has answered, until the decode worker's first token."""

    transfer: Transfer
    attempt: int
    """The prefill's."""
    source: Target
    cached: int

    @property
    def once(self) -> bool:
        """It is being computed, for the one worker that was told to take it; that one says how much was cached."""
        return only_pulls(self.source.moves_kv)


@dataclass(slots=True)
class Flight:
    rid: int
    job: Job
    sink: Sink
    since: float
    """When it was dispatched, or began to wait."""
    prefilling: bool = False
    """It has been sent to its worker, and no token of this attempt has come."""
    worker: NodeId | None = None
    attempt: int = 0
    received: int = 0
    output: array[int] = field(default_factory=lambda: array("I"))
    workers: list[NodeId] = field(default_factory=list)
    """That generated, or were to."""
    migrations: int = 0
    failures: int = 0
    moves: int = 0
    """Away from workers that drained."""
    failed: NodeId | None = None
    """The last worker that it was lost at."""
    decode: Decision | None = None
    """While a prefill worker computes: who was to go on."""
    prefill: Decision | None = None
    """The prefill worker that computes."""
    failed_prefill: NodeId | None = None
    lent: Lent | None = None
    trial: float = 0.0
    """It may kill its workers (:mod:`p2pdyn.core.trials`): seconds for which its tokens must come, from the first token
    on the time at which they have; 0 if it does not run under suspicion."""

    @property
    def tokens(self) -> array[int]:
        """Prompt and output so far."""
        return self.job.tokens + self.output if self.output else self.job.tokens

    @property
    def resumable(self) -> bool:
        """The client has seen nothing yet, or what it has seen can be continued."""
        return self.job.resumable or not self.received
