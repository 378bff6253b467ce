"""Stop strings in a stream: found across token borders, with only what could still become one held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Text in, text out, until a stop string is complete.

    What is handed out never contains a stop string nor a part that later text turns into one.  Of several, the one
    complete first wins, and of two complete together the longer: so the result does not depend on the token borders.
    """

    __slots__ = ("_firsts", "_held", "_longest", "_stops", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops``: not empty, nor is any of them."""
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops))
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is safe to hand out now; :attr:`found` says that the stop string has come."""
        if not text:
            return ""
        text = self._held + text
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)[1]]
        safe = self._safe(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text

    def _safe(self, text: str) -> int:
        """How much of ``text`` cannot belong to a stop string that is still to be completed."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts:
                end = text[start:]
                if any(stop.startswith(end) for stop in self._stops):
                    return start
        return len(text)
