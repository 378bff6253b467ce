"""The reader's side of KV transfers: every pull of one worker.

    waiting      for the engine to reserve blocks                 -> claiming, ended
    claiming     Claim sent                                       -> reading, ended, unanswered
    reading      a mover reads                                    -> committing, draining
    committing   the read is over and its tags are right          -> ended
    draining     given up while the mover still reads             -> ended
    unanswered   given up before we learnt what lease we have     -> ended

What is read is used only after the owner has said that the lease held throughout (Committed); everything else, at any
point, ends with ``Settle(filled=0)``: the engine computes.  The borrower asks for no block twice.  Its own deadline,
LEASE_S after it sent the last Claim or Renew that has been answered, is never later than the owner's, so that whoever
stood still neither reads on nor uses what it read.  docs/design/kv-transfer.md has the whole protocol.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import NamedTuple

from p2pdyn.core.lease import LEASE_S, longest_read
from p2pdyn.core.types import NodeId
from p2pdyn.engines.base import Release, Reserved, Settle
from p2pdyn.wire.kvpack import little
from p2pdyn.wire.requests import Claim, Commit, Committed, Granted, Renew, Renewed, Return

RENEW_S = 0.5
"""Between two Renews of a lease: three may be lost."""

REPLY_S = 1.0
"""Longest wait for an answer to Claim or Commit. The owner's loop answers them, after PIN_S at most."""

WAITING = "waiting"
CLAIMING = "claiming"
READING = "reading"
COMMITTING = "committing"
DRAINING = "draining"
UNANSWERED = "unanswered"
STATES = (WAITING, CLAIMING, READING, COMMITTING, DRAINING, UNANSWERED)

FILLED = "filled"
CACHED = "cached"
CANCELLED = "cancelled"
FAILED = "failed"
OUTCOMES = (FILLED, CACHED, CANCELLED, FAILED)

LEASE = "lease ended"
REFUSED = "refused"
SILENT = "no answer"
MALFORMED = "malformed answer"
LATE = "read timeout"
BROKEN = "read error"
TAGS = "wrong tag"
UNPROVEN = "not held"
LOST = "source lost"
UNREACHED = "source not reached"
DIED = "own engine died"
REASONS = (LEASE, REFUSED, SILENT, MALFORMED, LATE, BROKEN, TAGS, UNPROVEN, LOST, UNREACHED, DIED)
"""Why a pull failed; :data:`LEASE` is also its own deadline."""

Tag = tuple[bytes, int, int]
"""What stands behind a block: (first 8 bytes of its key, owner's epoch, generation)."""


class Ask(NamedTuple):
    """Send ``message`` on the request link to ``source``; whether it arrives is not our concern."""

    source: NodeId
    message: Claim | Renew | Commit | Return


class StartRead(NamedTuple):
    """Read the source's blocks ``remote`` into ours, ``local``, and their tags; :meth:`Borrower.read_over` then says
    whether these are ``tags``. It has to come exactly once, when nothing will be written any more."""

    ticket: int
    source: NodeId
    remote: tuple[int, ...]
    local: tuple[int, ...]
    tags: tuple[Tag, ...]


class CancelRead(NamedTuple):
    """The read is of no use any more; what :class:`StartRead` says of its end still holds."""

    ticket: int


Action = Ask | StartRead | CancelRead | Settle | Release


@dataclass(slots=True)
class Pull:
    key: int
    ticket: int
    source: NodeId
    epoch: int
    lease: int
    """0 while it has none."""
    proved: float
    """When that was sent which was answered last; until anything was, when the pull began."""
    state: str = WAITING
    until: float = inf
    """When the state ends by itself."""
    claimed_at: float = 0.0
    answered: bool = False
    """The Claim is."""
    renew_at: float = inf
    renewing: deque[float] = field(default_factory=deque)
    """When the Renews were sent that have not been answered."""
    reserved: Reserved | None = None
    filled: int = 0
    """Blocks being read."""
    reachable: bool = True
    """False: the link on which the lease was claimed is down, and nobody else has a say in it."""
    engine: bool = True
    """False: the engine that this was for is dead."""

    @property
    def given_up(self) -> bool:
        return self.state in (DRAINING, UNANSWERED)

    @property
    def deadline(self) -> float:
        """From when on the owner may have let the lease expire."""
        return self.proved + LEASE_S if self.lease and not self.given_up else inf


class Borrower:
    """Pure; ``now`` in seconds never goes back.  Each method first does what is due by ``now``, so that after a pause
    of the process nothing that waited meanwhile is taken for timely.  The caller carries out the actions in their
    order and calls :meth:`tick` at :meth:`next_deadline`.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self.pulls: dict[int, Pull] = {}
        """By the sequence's key."""
        self._by_ticket: dict[int, Pull] = {}
        self._by_lease: dict[int, Pull] = {}
        self._tickets = count(1)
        self._due = inf
        """Nothing happens by time alone before this."""
        self.outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        self.failures = Counter(dict.fromkeys(REASONS, 0))
        self.blocks = 0
        """Filled so far."""

    # What the own worker tells.

    def begin(self, key: int, source: NodeId, epoch: int, lease: int, now: float) -> list[Action]:
        """A sequence was admitted whose first blocks ``source`` has: under ``lease`` or, with 0, in its cache."""
        actions = self._advance(now)
        if lease in self._by_lease:  # an earlier attempt of the request has it, and ends it
            self.outcomes[FAILED] += 1
            self.failures[LEASE] += 1
            return actions
        pull = Pull(key, next(self._tickets), source, epoch, lease, now)
        self.pulls[key] = self._by_ticket[pull.ticket] = pull
        if lease:
            self._by_lease[lease] = pull
            actions.append(self._renew(pull, now))
        return actions

    def reserved(self, note: Reserved, now: float) -> list[Action]:
        """The engine has blocks for the sequence. If the pull has ended meanwhile, they are of no use."""
        actions = self._advance(now)
        pull = self.pulls.get(note.key)
        if pull is None:
            return [*actions, Settle(note.key, 0)] if note.blocks else actions
        if not note.blocks:
            self.outcomes[CACHED] += 1
            return actions + self._end(pull)
        pull.reserved, pull.claimed_at = note, now
        self._enter(pull, CLAIMING, now + REPLY_S)
        return [*actions, Ask(pull.source, Claim(pull.ticket, pull.lease, pull.epoch, b"".join(note.keys)))]

    def read_over(self, ticket: int, error: str, tags_right: bool, now: float) -> list[Action]:
        """The mover is done and writes nothing any more. ``error`` is empty if every block and tag was read."""
        actions = self._advance(now)
        pull = self._by_ticket.get(ticket)
        if pull is None:
            return actions
        if pull.state == DRAINING:
            return actions + ([Release(pull.key)] if pull.engine else []) + self._end(pull)
        if pull.state != READING:
            return actions
        self._enter(pull, COMMITTING, now + REPLY_S)
        if error or not tags_right:
            return actions + self._fail(pull, BROKEN if error else TAGS)
        pull.renew_at = inf
        return [*actions, Ask(pull.source, Commit(ticket, pull.lease, pull.epoch))]

    def cannot(self, key: int, now: float) -> list[Action]:
        """There is no link to the source, or nothing by which its memory can be read."""
        actions = self._advance(now)
        pull = self.pulls.get(key)
        return actions + self._fail(pull, UNREACHED) if pull else actions

    def cancel(self, key: int, now: float) -> list[Action]:
        """The sequence was aborted."""
        actions = self._advance(now)
        pull = self.pulls.get(key)
        return actions + self._give_up(pull, CANCELLED) if pull else actions

    def clear(self, now: float) -> list[Action]:
        """The own engine died: it is told nothing more."""
        actions = self._advance(now)
        for pull in list(self.pulls.values()):
            pull.engine = False
            actions += self._fail(pull, DIED)
        return actions

    # What the source says.

    def granted(self, source: NodeId, message: Granted, now: float) -> list[Action]:
        actions = self._advance(now)
        pull = self._by_ticket.get(message.ticket)
        if pull is None or pull.source != source or pull.state not in (CLAIMING, UNANSWERED):
            return actions
        pull.answered = True
        if not pull.lease and message.lease and message.lease not in self._by_lease:
            pull.lease = message.lease
            pull.renew_at = now + RENEW_S
            self._by_lease[pull.lease] = pull
        if pull.state == UNANSWERED:
            return actions + self._end(pull)
        if not message.blocks:
            return actions + self._fail(pull, REFUSED)
        pull.proved = max(pull.proved, pull.claimed_at)
        return actions + self._read(pull, message, now)

    def renewed(self, source: NodeId, message: Renewed, now: float) -> list[Action]:
        actions = self._advance(now)
        pull = self._by_lease.get(message.lease)
        if pull is None or pull.source != source or pull.given_up or not pull.renewing:
            return actions
        if pull.state == COMMITTING:  # the commit itself may have ended the lease before the Renew came
            return actions
        if not message.held:
            return actions + self._fail(pull, LEASE)
        # Which Renew it answers is not said: at the earliest, the oldest that is open.
        pull.proved = max(pull.proved, pull.renewing.popleft())
        return actions

    def committed(self, source: NodeId, message: Committed, now: float) -> list[Action]:
        actions = self._advance(now)
        pull = self._by_ticket.get(message.ticket)
        if pull is None or pull.source != source or pull.state != COMMITTING:
            return actions
        if not message.held:
            return actions + self._fail(pull, UNPROVEN)
        self._drop(pull)
        self.outcomes[FILLED] += 1
        self.blocks += pull.filled
        return [*actions, Settle(pull.key, pull.filled)]

    def source_lost(self, source: NodeId, now: float) -> list[Action]:
        """Its link is down, or it has another epoch."""
        actions = self._advance(now)
        for pull in [pull for pull in self.pulls.values() if pull.source == source]:
            pull.reachable = False
            if pull.state == UNANSWERED:
                self._drop(pull)
            actions += self._fail(pull, LOST)
        return actions

    # Time.

    def tick(self, now: float) -> list[Action]:
        return self._advance(now)

    def next_deadline(self) -> float | None:
        """When to call :meth:`tick`; it may be early."""
        return None if self._due == inf else self._due

    # What there is.

    def states(self) -> dict[str, int]:
        """Pulls by state."""
        count = Counter(pull.state for pull in self.pulls.values())
        return {state: count[state] for state in STATES}

    @property
    def bytes(self) -> int:
        """Filled so far."""
        return self.blocks * self._block_bytes

    # Inside.

    def _advance(self, now: float) -> list[Action]:
        if now < self._due:
            return []
        actions: list[Action] = []
        for pull in list(self.pulls.values()):
            if pull.deadline <= now:
                actions += self._fail(pull, LEASE)
            elif pull.until <= now and pull.state == UNANSWERED:
                self._drop(pull)
            elif pull.until <= now:
                actions += self._fail(pull, LATE if pull.state == READING else SILENT)
            elif pull.renew_at <= now:
                actions.append(self._renew(pull, now))
        self._due = min([_next(pull) for pull in self.pulls.values()], default=inf)
        return actions

    def _enter(self, pull: Pull, state: str, until: float) -> None:
        pull.state, pull.until = state, until
        self._due = min(self._due, _next(pull))

    def _renew(self, pull: Pull, now: float) -> Ask:
        pull.renewing.append(now)
        pull.renew_at = now + RENEW_S
        self._due = min(self._due, _next(pull))
        return Ask(pull.source, Renew(pull.lease, pull.epoch))

    def _read(self, pull: Pull, message: Granted, now: float) -> list[Action]:
        note = pull.reserved
        assert note is not None
        count = len(message.blocks) // 4
        if (
            not pull.lease
            or message.lease != pull.lease
            or len(message.blocks) % 4
            or len(message.generations) != len(message.blocks)
            or count > len(note.blocks)
        ):
            return self._fail(pull, MALFORMED)
        remote, generations = (little(array("I", data)) for data in (message.blocks, message.generations))
        tags = tuple((key[:8], pull.epoch, one) for key, one in zip(note.keys, generations, strict=False))
        pull.filled = count
        self._enter(pull, READING, now + longest_read(count * self._block_bytes))
        return [StartRead(pull.ticket, pull.source, tuple(remote), note.blocks[:count], tags)]

    def _fail(self, pull: Pull, reason: str) -> list[Action]:
        self.failures[reason] += not pull.given_up
        return self._give_up(pull, FAILED)

    def _give_up(self, pull: Pull, outcome: str) -> list[Action]:
        """The engine computes. The one way out of all that was not filled."""
        if pull.given_up:
            return []
        self.outcomes[outcome] += 1
        pull.renew_at = inf
        actions: list[Action] = []
        reading = pull.state == READING
        if reading:
            actions.append(CancelRead(pull.ticket))
        if pull.reserved and pull.engine:
            actions.append(Settle(pull.key, 0, over=not reading))
        if reading:
            self._enter(pull, DRAINING, inf)
        elif pull.state == CLAIMING and not pull.lease and not pull.answered and pull.reachable:
            self._enter(pull, UNANSWERED, pull.claimed_at + LEASE_S)
        else:
            actions += self._end(pull)
        return actions

    def _end(self, pull: Pull) -> list[Action]:
        """Nothing is under way any more."""
        self._drop(pull)
        return [Ask(pull.source, Return(pull.lease, pull.epoch))] if pull.lease and pull.reachable else []

    def _drop(self, pull: Pull) -> None:
        del self.pulls[pull.key], self._by_ticket[pull.ticket]
        if pull.lease:
            del self._by_lease[pull.lease]


def _next(pull: Pull) -> float:
    """When time alone does something."""
    return min(pull.until, pull.deadline, pull.renew_at)
