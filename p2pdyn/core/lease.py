"""The owner's side of KV transfers: which of our blocks other workers may read, and until when.

    granted      a prompt is computed, nobody knows its blocks yet    -> claimed, ended
    claimed      one connection knows them and may be reading         -> ended, quarantined
    quarantined  no commit can succeed, a read may still be running   -> ended

One promise is kept, the one that the reader's side lives on: ``Committed(held=True)`` is said only of a lease that has
been *claimed* without a gap since its Granted, so the engine got no Release for its blocks in between.  It is kept by
the order of what happens here and not by any clock; the times only bound how long blocks wait for a peer that is gone.
docs/design/kv-transfer.md has the whole protocol.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from p2pdyn.engines.base import Held, Pin, Release
from p2pdyn.wire.kvpack import little
from p2pdyn.wire.requests import KEY, Claim, Commit, Committed, Granted, Renew, Renewed, Return

LEASE_S = 2.0
"""A claimed lease without a Renew for this long expires: far longer than a healthy loop's pauses (0.1 s) and four times
RENEW_S, yet short, because a dead borrower costs its blocks for as long."""

READ_MIN_S = 1.0
READ_BYTES_S = 50e6
"""The longest read: :func:`longest_read`. The slowest tcp path seen moved 300 MB/s."""

PIN_S = 0.5
"""Seconds for the engine to pin a prefix, which needs a step of it; computing it is no slower than waiting longer."""

MAX_LEASES = 1024
"""Pins that the engine has not answered included."""

GRANTED = "granted"
CLAIMED = "claimed"
QUARANTINED = "quarantined"
STATES = (GRANTED, CLAIMED, QUARANTINED)


class Reply(NamedTuple):
    """Send ``message`` to the borrower behind ``connection``."""

    connection: bytes
    message: Granted | Renewed | Committed


Action = Reply | Pin | Release


@dataclass(slots=True)
class Lease:
    number: int
    held: Held
    until: float
    """When it expires; in quarantine, when it ends."""
    state: str = GRANTED
    borrower: bytes = b""
    """The connection of its first claim; empty while granted."""


class _Pinning(NamedTuple):
    """A Claim of a prefix that waits for the engine."""

    connection: bytes
    ticket: int
    keys: int
    until: float


def longest_read(size: int) -> float:
    """Seconds that a read of ``size`` bytes may take (READ_S)."""
    return READ_MIN_S + size / READ_BYTES_S


class Lender:
    """All leases on one engine's blocks. ``draw`` gives random lease numbers of 63 bits.

    Pure; ``now`` in seconds never goes back.  Each method first lets expire what has by ``now``, so that after a pause
    of the process no message that waited meanwhile is answered as if there had been none.  The caller carries out the
    actions in their order and calls :meth:`tick` at :meth:`next_deadline`.  Keys of pins are negative, those of
    sequences (:mod:`p2pdyn.core.served`) positive.
    """

    def __init__(self, epoch: int, draw: Callable[[], int], kv_blocks: int, block_bytes: int) -> None:
        self.epoch = epoch
        self._draw = draw
        self._max_blocks = kv_blocks // 2
        self._block_bytes = block_bytes
        self.leases: dict[int, Lease] = {}
        self._pinning: dict[int, _Pinning] = {}
        self._last_pin = 0
        self._lent: Counter[int] = Counter()
        """How many leases each block is in."""
        self._due = inf
        """Nothing happens by time alone before this."""
        self.refusals = 0
        """Claims that got no block, and prompts that were not held for want of room."""
        self.quarantined = 0
        self.expired = 0

    # What the engine tells.

    def handed_over(self, held: Held, now: float) -> tuple[int, list[Action]]:
        """A prompt is computed: the number of its lease, or 0 if it has no full block or there is no room for it."""
        actions = self._expire(now)
        room = self._room() >= sum(block not in self._lent for block in held.blocks)
        if held.blocks and room:
            return self._grant(held, now).number, actions
        self.refusals += not room
        return 0, [*actions, Release(held.key)]

    def pinned(self, held: Held, now: float) -> list[Action]:
        """The answer to a Pin."""
        actions = self._expire(now)
        pinning = self._pinning.pop(held.key, None)
        if pinning is None:
            return [*actions, Release(held.key)]
        if not held.blocks:
            refusal = self._refuse(pinning.connection, pinning.ticket, "the blocks are not in the cache")
            return [*actions, Release(held.key), refusal]
        lease = self._grant(held, now)
        lease.state, lease.borrower = CLAIMED, pinning.connection
        return [*actions, _granted(lease, pinning.ticket, 0, len(held.blocks))]

    def engine_died(self) -> list[Action]:
        """All leases end; there is no engine that could be told."""
        self.leases.clear()
        self._lent.clear()
        return self._refuse_pinnings("the engine died")

    # What a borrower asks.

    def claim(self, connection: bytes, message: Claim, now: float) -> list[Action]:
        actions = self._expire(now)
        keys = [message.keys[at : at + KEY] for at in range(0, len(message.keys), KEY)]
        if message.epoch != self.epoch:
            return [*actions, self._refuse(connection, message.ticket, f"the owner has epoch {self.epoch} by now")]
        if not message.lease:
            return actions + self._pin(connection, message.ticket, keys, now)
        lease = self._find(connection, message)
        if lease is None or lease.state == QUARANTINED:
            return [*actions, self._refuse(connection, message.ticket, "the lease has ended")]
        first, count = _run(lease.held.keys, keys)
        if not count:
            return [*actions, self._refuse(connection, message.ticket, "the lease is for other blocks")]
        lease.state, lease.borrower, lease.until = CLAIMED, connection, now + LEASE_S
        return [*actions, _granted(lease, message.ticket, first, count)]

    def renew(self, connection: bytes, message: Renew, now: float) -> list[Action]:
        actions = self._expire(now)
        lease = self._find(connection, message)
        held = lease is not None and lease.state != QUARANTINED
        if lease and held:
            lease.until = now + LEASE_S
        return [*actions, Reply(connection, Renewed(message.lease, held))]

    def commit(self, connection: bytes, message: Commit, now: float) -> list[Action]:
        """Whatever the answer is, the read is over, so the lease ends."""
        actions = self._expire(now)
        lease = self._find(connection, message)
        if lease is None or lease.state == GRANTED:
            return [*actions, Reply(connection, Committed(message.ticket, False))]
        held = lease.state == CLAIMED
        return [*actions, Reply(connection, Committed(message.ticket, held)), self._end(lease)]

    def give_back(self, connection: bytes, message: Return, now: float) -> list[Action]:
        actions = self._expire(now)
        lease = self._find(connection, message)
        return actions if lease is None else [*actions, self._end(lease)]

    # Others.

    def cancel(self, number: int, now: float) -> list[Action]:
        """The frontend has given up the request that the lease was made for."""
        actions = self._expire(now)
        lease = self.leases.get(number)
        return actions if lease is None else actions + self._stop(lease)

    def raise_epoch(self, epoch: int, now: float) -> list[Action]:
        """This node has another epoch from now on: nobody can refer to the leases any more."""
        actions = self._expire(now)
        self.epoch = epoch
        for lease in list(self.leases.values()):
            actions += self._stop(lease)
        return actions + self._refuse_pinnings("the owner's epoch was raised")

    def tick(self, now: float) -> list[Action]:
        return self._expire(now)

    def next_deadline(self) -> float | None:
        """When to call :meth:`tick`; it may be early."""
        return None if self._due == inf else self._due

    # What there is.

    def holds(self, block: int) -> bool:
        """Whether ``block`` is in a lease: no other may leave this worker."""
        return block in self._lent

    @property
    def blocks(self) -> int:
        """Blocks in leases; one in several counts once."""
        return len(self._lent)

    def states(self) -> dict[str, int]:
        """Leases by state."""
        count = Counter(lease.state for lease in self.leases.values())
        return {state: count[state] for state in STATES}

    # Inside.

    def _find(self, connection: bytes, message: Claim | Renew | Commit | Return) -> Lease | None:
        """The lease that ``message`` is about, if its sender has a say in it."""
        lease = self.leases.get(message.lease)
        if lease is None or message.epoch != self.epoch or lease.borrower not in (b"", connection):
            return None
        return lease

    def _room(self) -> int:
        """Blocks that may still come into leases; -1 if no lease may."""
        if len(self.leases) + len(self._pinning) >= MAX_LEASES:
            return -1
        return self._max_blocks - len(self._lent) - sum(pinning.keys for pinning in self._pinning.values())

    def _pin(self, connection: bytes, ticket: int, keys: list[bytes], now: float) -> list[Action]:
        room = self._room()
        if not keys or room <= 0:
            return [self._refuse(connection, ticket, "too much of the cache is lent already")]
        keys = keys[:room]
        self._last_pin -= 1
        self._pinning[self._last_pin] = _Pinning(connection, ticket, len(keys), now + PIN_S)
        self._due = min(self._due, now + PIN_S)
        return [Pin(self._last_pin, tuple(keys))]

    def _grant(self, held: Held, now: float) -> Lease:
        number = self._draw()
        while not number or number in self.leases:
            number = self._draw()
        lease = self.leases[number] = Lease(number, held, now + LEASE_S)
        self._lent.update(held.blocks)
        self._due = min(self._due, lease.until)
        return lease

    def _refuse(self, connection: bytes, ticket: int, reason: str) -> Reply:
        self.refusals += 1
        return Reply(connection, Granted(ticket, 0, b"", b"", reason))

    def _refuse_pinnings(self, reason: str) -> list[Action]:
        pinnings, self._pinning = self._pinning, {}
        return [self._refuse(one.connection, one.ticket, reason) for one in pinnings.values()]

    def _stop(self, lease: Lease) -> list[Action]:
        """No commit succeeds any more. A borrower that heard us last begins no read after ``until``."""
        if lease.state == GRANTED:
            return [self._end(lease)]
        if lease.state == CLAIMED:
            self.quarantined += 1
            lease.state = QUARANTINED
            lease.until += longest_read(len(lease.held.blocks) * self._block_bytes)
        return []

    def _end(self, lease: Lease) -> Release:
        del self.leases[lease.number]
        lent = self._lent
        for block in lease.held.blocks:
            lent[block] -= 1
            if not lent[block]:
                del lent[block]
        return Release(lease.held.key)

    def _expire(self, now: float) -> list[Action]:
        if now < self._due:
            return []
        actions: list[Action] = []
        for lease in list(self.leases.values()):
            if lease.state != QUARANTINED and lease.until <= now:
                self.expired += 1
                actions += self._stop(lease)
            if lease.state == QUARANTINED and lease.until <= now:
                actions.append(self._end(lease))
        for key in [key for key, pinning in self._pinning.items() if pinning.until <= now]:
            pinning = self._pinning.pop(key)
            actions.append(self._refuse(pinning.connection, pinning.ticket, "the engine is busy"))
        waits = [lease.until for lease in self.leases.values()] + [one.until for one in self._pinning.values()]
        self._due = min(waits, default=inf)
        return actions


def _run(held: Sequence[bytes], wanted: Sequence[bytes]) -> tuple[int, int]:
    """Where ``wanted`` begins in ``held``, and for how many keys the two go on alike."""
    if not wanted or wanted[0] not in held:
        return 0, 0
    first = count = held.index(wanted[0])
    for one, other in zip(held[first:], wanted, strict=False):
        if one != other:
            break
        count += 1
    return first, count - first


def _granted(lease: Lease, ticket: int, first: int, count: int) -> Reply:
    span = slice(first, first + count)
    blocks, generations = (
        little(array("I", numbers[span])).tobytes() for numbers in (lease.held.blocks, lease.held.generations)
    )
    return Reply(lease.borrower, Granted(ticket, lease.number, blocks, generations))
