"""How many prompts share a prefix: what tells a system prompt from the history of one conversation.

Both are long and held by one target at first.  But each turn of a conversation goes on where the last one ended, while
prompts behind a system prompt all leave the known path at its end.  So it is counted where prompts leave it: one number
for each such place, of the seconds in which that happened.  A burst of siblings is one second and changes nothing.
"""

from __future__ import annotations

MAX_PLACES = 8192
"""About 2 MB; the least recently used is forgotten first."""
APART_S = 1.0


class Shared:
    """Places are sequence hashes: of the last block of a prompt that some target held."""

    def __init__(self, limit: int = MAX_PLACES) -> None:
        self._limit = limit
        self._places: dict[int, tuple[int, float]] = {}

    def count(self, place: int) -> int:
        """In how many seconds prompts have left off there."""
        known = self._places.get(place)
        return 0 if known is None else known[0]

    def left(self, place: int, now: float) -> None:
        """A prompt leaves the known path there."""
        places = self._places
        count, last = places.pop(place, (0, now - APART_S))
        places[place] = (count + 1, now) if now - last >= APART_S else (count, last)
        if len(places) > self._limit:
            del places[next(iter(places))]
