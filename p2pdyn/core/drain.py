"""When a node that drains asks what of whom, and when it goes (docs/design/drain.md).

serving --asked--> finishing --FINISH_S--> moving --LIMIT_S--> left
                       |                     |
                       +--nothing is open----+---------------> left
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from p2pdyn.core.types import AGGREGATED, DECODE, READY, NodeId, PeerInfo

FINISH_S = 20.0
"""Seconds for streams to end by themselves: most do, and moving one costs a prefill of all it has."""

LIMIT_S = 80.0
"""Seconds, from the start, for what cannot be moved: systemd grants 90 by default (TimeoutStopSec)."""

MOVE_S = 0.25
"""Between two askings to move: as often as heartbeats, since one may be lost, and a worker may come that takes them."""

HELD_S = 12.0
"""How long an engine that moves KV by itself may hold what it has handed over: vLLM's ``kv_lease_duration``."""


class Open(NamedTuple):
    """What a node would lose if it ended now."""

    streams: int = 0
    """Requests on its engine."""
    leases: int = 0
    """On its KV blocks."""
    answers: int = 0
    """Of its HTTP endpoint."""
    workers: int = 0
    """That it supervises."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Somebody asks for a drain: again and again, if they like."""


@dataclass(frozen=True, slots=True)
class Signal:
    """SIGTERM: the first one asks for a drain, the second for the end."""


@dataclass(frozen=True, slots=True)
class Seen:
    open: Open


Event = Begin | Signal | Seen


@dataclass(frozen=True, slots=True)
class Refuse:
    """Say that this node drains, and take nothing new."""


@dataclass(frozen=True, slots=True)
class DrainWorkers:
    """Those that it supervises."""


@dataclass(frozen=True, slots=True)
class HurryWorkers:
    """They have had their time."""


@dataclass(frozen=True, slots=True)
class Move:
    """Ask the frontends to take their streams elsewhere."""


@dataclass(frozen=True, slots=True)
class End:
    """End with an error what is still open."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Last."""


Action = Refuse | DrainWorkers | HurryWorkers | Move | End | Leave
State = Literal["serving", "finishing", "moving", "left"]


class Drain:
    """Pure: :meth:`handle` an event at ``now`` (seconds, monotonic); once it has begun, Seen every now and then."""

    def __init__(self) -> None:
        self.state: State = "serving"
        self.open = Open()
        self._signals = 0
        self._since = self._moved = 0.0
        self._workers_told = False

    @property
    def begun(self) -> bool:
        return self.state != "serving"

    def left_s(self, now: float) -> float:
        """Until the limit."""
        return max(0.0, self._since + LIMIT_S - now) if self.begun else LIMIT_S

    def handle(self, event: Event, now: float) -> list[Action]:
        if self.state == "left":
            return []
        if isinstance(event, Seen):
            return self._seen(event.open, now) if self.begun else []
        self._signals += isinstance(event, Signal)
        if self._signals > 1:
            # What can move still does, in the moment that the good-bye takes.
            self.state = "left"
            return [Move(), HurryWorkers(), Leave()]
        if self.begun:
            return []
        self.state, self._since = "finishing", now
        return [Refuse()]

    def _seen(self, open_: Open, now: float) -> list[Action]:
        self.open = open_
        actions: list[Action] = []
        late = now >= self._since + FINISH_S
        if not self._workers_told and (late or not open_.answers):
            self._workers_told = True
            actions.append(DrainWorkers())
        if not any(open_):
            self.state = "left"
            return [*actions, Leave()]
        if now >= self._since + LIMIT_S:
            self.state = "left"
            return [*actions, End(), HurryWorkers(), Leave()]
        if late and (self.state == "finishing" or now >= self._moved + MOVE_S):
            self.state, self._moved = "moving", now
            actions.append(Move())
        return actions


def last_of(leaving: Collection[NodeId], peers: Iterable[tuple[NodeId, PeerInfo]]) -> tuple[str, ...]:
    """The models that nobody would answer for any more once ``leaving`` are gone. ``peers`` are all that live, these
    included."""
    going: set[tuple[str, str]] = set()
    staying: set[tuple[str, str]] = set()
    for node, info in peers:
        if info.state == READY and info.role in (AGGREGATED, DECODE):
            (going if node in leaving else staying).update((model.name, model.fingerprint) for model in info.models)
    return tuple(sorted({name for name, _ in going - staying}))
