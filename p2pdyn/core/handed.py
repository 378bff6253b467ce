"""Prompts that a worker handed over whose engine moves KV by itself (vLLM): it alone knows when blocks are taken."""

from __future__ import annotations

from collections.abc import Iterable

from p2pdyn.core.drain import HELD_S

MAX_HELD = 1024
"""Remembered, for a frontend that gives one up: it does so within seconds, or never."""

Request = tuple[bytes, int, int]
"""(connection, rid, attempt)."""


class HandedOver:
    """Pure bookkeeping; ``now`` in seconds. Keys are those by which the engine knows the requests."""

    def __init__(self) -> None:
        self._held: dict[Request, tuple[int, float]] = {}

    def add(self, request: Request, key: int, now: float) -> None:
        self._held[request] = key, now
        while len(self._held) > MAX_HELD:
            del self._held[next(iter(self._held))]

    def given_up(self, connection: bytes, requests: Iterable[tuple[int, int]]) -> list[int]:
        """The keys of those that are wanted no more."""
        if not self._held:
            return []
        found = [self._held.pop((connection, *request), None) for request in requests]
        return [one[0] for one in found if one is not None]

    def recent(self, now: float) -> int:
        """How many may still be waiting to be taken: handed over less than :data:`HELD_S` ago."""
        return sum(now - since < HELD_S for _, since in self._held.values())
