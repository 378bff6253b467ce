"""Flights that may kill their workers: held until they can be tried alone, ended once they have done it.

Who is a suspect, and for how long it is tried, is :mod:`p2pdyn.core.blame`'s to say.
"""

from __future__ import annotations

from collections.abc import Collection

from p2pdyn.core.blame import DEATH_LIMIT, PROOF_S, Blame
from p2pdyn.core.flight_parts import Flight
from p2pdyn.core.request import Failure
from p2pdyn.core.types import NodeId

TRIALS_S = 60.0
"""A request under suspicion waits that long for a worker that no other one of them is tried on."""


class Trials:
    """Pure; ``now`` in seconds. Flights are routed, sent and ended by :class:`p2pdyn.core.flight.Flights`."""

    def __init__(self) -> None:
        self.blame = Blame()
        self.held: dict[int, Flight] = {}
        """Suspects that wait until they can be tried alone, and those accused."""
        self.room = False
        """One of them might now."""
        self._accused: dict[int, tuple[NodeId, str]] = {}
        """Those whose worker seems to have died during their trial, and why it is lost."""

    @property
    def taken(self) -> Collection[NodeId]:
        """Workers that a suspect runs on."""
        return self.blame.trials

    def suspect(self, rid: int) -> bool:
        """Whether it must run apart from other suspects."""
        return self.blame.suspect(rid)

    def accused(self, rid: int) -> bool:
        """Whether it must wait for its worker to come back, or its end."""
        return rid in self._accused

    def begin(self, flight: Flight, worker: NodeId) -> None:
        """A suspect is sent to ``worker``."""
        flight.trial = self.blame.begin(flight.rid, worker)

    def passed(self, flight: Flight) -> None:
        """Its tokens have come for long enough: it has not killed the workers that it was lost at."""
        flight.trial = 0.0
        self.blame.passed(flight.rid)
        self.room = bool(self.held)

    def left(self, flight: Flight) -> None:
        """It is on its worker no more, with its trial not over."""
        flight.trial = 0.0
        self.blame.left(flight.rid)
        self.room = bool(self.held)

    def forget(self, rid: int) -> None:
        """It has ended."""
        self.held.pop(rid, None)
        self._accused.pop(rid, None)
        self.blame.forget(rid)

    def died(self, worker: NodeId, rids: Collection[int], reason: str) -> None:
        """A worker has, for all we know, with these open on it."""
        accused = self.blame.died(worker, rids)
        if accused is not None:
            self._accused[accused] = worker, reason

    def lives(self, worker: NodeId) -> None:
        """It was cut off and has not died."""
        self.blame.lives(worker)
        for rid in [rid for rid, (by, _) in self._accused.items() if by == worker]:
            del self._accused[rid]
        self.room = True

    def take(self) -> list[Flight]:
        """Those held, to be routed again, if that may go otherwise than before."""
        if not self.room:
            return []
        self.room = False
        held, self.held = self.held, {}
        return list(held.values())

    def guilty(self, now: float) -> list[tuple[int, Failure]]:
        """Those whose workers have not come back, to be ended by the caller."""
        ended = []
        for rid, (_, reason) in self._accused.items():
            if self.held[rid].since + PROOF_S <= now:
                self.blame.convict(rid)
                text = f"Each of {DEATH_LIMIT} workers that ran this request died, the last one of it alone: {reason}."
                ended.append((rid, Failure(500, "request_kills_workers", text)))
                self.room = True
        return ended

    def overdue(self, now: float) -> list[tuple[Flight, Failure]]:
        """Those held for too long, to be ended by the caller."""
        message = "Workers died that ran this request among others, and none is free to run it alone; retry later."
        failure = Failure(503, "worker_lost", message, 5)
        return [(flight, failure) for flight in self.held.values() if flight.since + TRIALS_S <= now]
