"""Where we stand in an engine's own stream of KV events, which counts from 0, has no epoch and no snapshot.

vLLM and SGLang publish over PUB and keep the last messages (10,000 by default) for replay.  Rules:

1. A message is applied when it is the next one.  One further ahead waits, and a replay is asked for.
2. Seq 0, or a seq that goes back, is a new publisher: what the old one told is cleared.
3. A replay is asked for from the last message that was applied, and has to begin with the same bytes (a mark stands
   for them): a publisher that restarted while nobody listened may have counted past us already.  So after each
   (re)connection nothing is applied before a replay has begun like that, or seq 0 came.
4. Replays overlap with live messages.  A live message that a replay brought already is known by its mark; any other
   one that is not the next is rule 2.
5. A replay that begins too late, or that brings nothing new, is all there is: what was known is cleared, because a
   removal may be among the lost, and the stream goes on DEGRADED.  Blocks told from there on are right; what is missing
   comes back when the engine stores it anew.  It ends when the engine clears its cache, or starts again from seq 0.

The caller carries the messages out: it keeps at most one replay open, and drops it for each new :class:`Ask`.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_HELD = 4096
MAX_HELD_BYTES = 32 * 2**20
"""Messages, and bytes, that wait for a replay; more are dropped, and asked for again with the next one."""
MAX_MARKS = 2**16
"""Marks of messages that a replay brought before they came live; without its mark a message counts as a restart."""

LOST = "the engine's replay buffer no longer has the events that were missed"
SILENT = "the engine does not replay its events"
UNREADABLE = "an event of the engine could not be read"
ADVICE = "blocks it cached before are unknown until it stores them again or its cache is reset"


@dataclass(frozen=True, slots=True)
class Apply:
    """Decode and apply a message."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget every block: the publisher is a new one, or events are lost."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask for a replay from seq ``first``, in place of one that may be open."""

    first: int


Action = Apply | Clear | Ask


class EngineStream:
    """One publisher's cursor. Each method returns what the caller has to do, in order."""

    def __init__(self) -> None:
        self.next = 0
        """The seq that is to be applied next."""
        self.degraded = ""
        """Why the known blocks are only some of the engine's: a sentence, or empty."""
        self.restarts = 0
        self.lost = 0
        """How often events were missed for good."""
        self._same = False  # the publisher is known to be the one that told what was applied
        self._live = -1  # the highest live seq
        self._marks: dict[int, int] = {}  # of the last message applied, and of replayed ones that may still come live
        self._held: dict[int, tuple[bytes, int]] = {}
        self._held_bytes = 0
        self._asked: Ask | None = None
        self._asked_mark: int | None = None
        self._asked_live = -1  # the replay has to reach at least this seq
        self._begun = False  # the open replay's first answer came
        self._moved = False  # the open replay brought something new

    @property
    def state(self) -> str:
        """exact (as far as can be known: the last message may be lost), replaying or degraded."""
        if self.degraded:
            return "degraded"
        return "exact" if self._same and not self._behind() else "replaying"

    @property
    def asking(self) -> bool:
        """A replay is open; another one's answers are of no use."""
        return self._asked is not None

    def connected(self) -> list[Action]:
        """A connection to the publisher is up, perhaps to a new one."""
        self.disconnected()
        return self._ask()

    def disconnected(self) -> None:
        """The connection is lost. What came over it and waits is dropped: the next replay brings it, if it is ours."""
        self._same, self._asked, self._live = False, None, -1
        self._drop_held()

    def probe(self) -> list[Action]:
        """Ask whether the last messages were lost: now and then, while nothing comes."""
        return self._ask() if self._asked is None else []

    def message(self, seq: int, payload: bytes, mark: int) -> list[Action]:
        """A live message. ``mark`` is any fingerprint of ``payload``, which must hold something that is never the same
        again (engines put the time in)."""
        actions: list[Action] = []
        if seq < self.next or seq <= self._live:
            if self._known(seq, mark):
                self._live = max(seq, self._live)
                return []
            actions += self._restart()
        self._live = seq
        if seq == self.next and (self._same or seq == 0):
            return [*actions, *self._apply(seq, payload, mark), *self._advance()]
        self._hold(seq, payload, mark)
        if self._asked is None:
            actions += self._ask()
        return actions

    def replayed(self, seq: int, payload: bytes, mark: int) -> list[Action]:
        """An answer of the open replay."""
        if self._asked is None or (not self._begun and seq < self._asked.first):
            return []
        actions: list[Action] = []
        if not self._begun:
            self._begun = True
            if seq == self._asked.first:
                if self._asked_mark is not None and self._asked_mark != mark:
                    return [*self._restart(), *self._ask()]
            elif seq > self.next or not self._same:
                actions += self._lose(seq, LOST)
            self._same = True
        if seq == self.next:
            self._moved = True
            actions += self._apply(seq, payload, mark)
        elif seq > self.next:
            self._hold(seq, payload, mark)
        return actions

    def replay_ended(self) -> list[Action]:
        """END_SEQ came."""
        if self._asked is None:
            return []
        self._asked = None
        if not self._begun and not self._same and self.next:  # not even the last message that we know
            return [*self._restart(), *self._ask()]
        self._same = True
        actions = self._advance()
        if not self._behind():
            return actions
        if self._moved or self.next > self._asked_live:  # it left something out, or was asked for too early
            return [*actions, *self._ask()]
        return [*actions, *self._lose(self._first_held(), LOST), *self._catch_up()]

    def replay_stalled(self) -> list[Action]:
        """Nothing more came of the replay that is open: ask again, for what is still missing."""
        return [] if self._asked is None else self._ask()

    def replay_failed(self) -> list[Action]:
        """The replay will not be answered, and the caller has tried often enough."""
        if self._asked is None:
            return []
        self._asked = None
        if self._same and not self._behind():
            return []
        actions = self._lose(self._first_held(), SILENT)
        self._same = True
        return [*actions, *self._catch_up()]

    def decoded(self, complete: bool) -> None:
        """An applied message cleared the engine's cache (True), or was unreadable, which cleared ours (False)."""
        self.degraded = "" if complete else _sentence(UNREADABLE)

    def _ask(self) -> list[Action]:
        first = max(self.next - 1, 0)
        self._asked, self._asked_mark = Ask(first), self._marks.get(first) if self.next else None
        self._asked_live, self._begun, self._moved = self._live, False, False
        return [self._asked]

    def _behind(self) -> bool:
        return bool(self._held) or self._live >= self.next

    def _known(self, seq: int, mark: int) -> bool:
        held = self._held.get(seq)
        return (held[1] if held is not None else self._marks.get(seq)) == mark

    def _apply(self, seq: int, payload: bytes, mark: int) -> list[Action]:
        if seq == 0:
            self._same, self.degraded = True, ""
        if seq <= self._live:
            self._marks.clear()
        elif len(self._marks) >= MAX_MARKS:
            del self._marks[next(iter(self._marks))]
        self._marks[seq] = mark
        self.next = seq + 1
        return [Apply(payload)]

    def _advance(self) -> list[Action]:
        """Apply what waited and is next; forget what waited in vain."""
        actions: list[Action] = []
        while (held := self._held.pop(self.next, None)) is not None:
            self._held_bytes -= len(held[0])
            actions += self._apply(self.next, *held)
        for seq in [seq for seq in self._held if seq < self.next]:
            self._held_bytes -= len(self._held.pop(seq)[0])
        return actions

    def _catch_up(self) -> list[Action]:
        """Apply what waited; ask for what is missing behind it."""
        return [*self._advance(), *(self._ask() if self._behind() else [])]

    def _hold(self, seq: int, payload: bytes, mark: int) -> None:
        if seq in self._held:
            return
        if len(self._held) >= MAX_HELD or self._held_bytes + len(payload) > MAX_HELD_BYTES:
            self._drop_held()
        self._held[seq] = (payload, mark)
        self._held_bytes += len(payload)

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_bytes = 0

    def _first_held(self) -> int:
        return min(self._held, default=self._live + 1)

    def _restart(self) -> list[Action]:
        """The publisher is a new one. What waits may be the old one's; a replay brings it again if it is not."""
        known = self.next > 0
        self.disconnected()
        self.next, self.degraded = 0, ""
        self._marks.clear()
        self.restarts += known
        return [Clear()] if known else []

    def _lose(self, seq: int, why: str) -> list[Action]:
        """Go on from ``seq`` without what lies before it."""
        known = self.next > 0
        self.next, self.degraded = seq, _sentence(why)
        self._marks.clear()
        self.lost += 1
        return [Clear()] if known else []


def _sentence(why: str) -> str:
    return f"{why}: {ADVICE}"
