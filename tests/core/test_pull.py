"""One worker's pulls, state by state: what ends each of them, and what the engine, the mover and the owner are told."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import pytest

from p2pdyn.core.lease import LEASE_S, longest_read
from p2pdyn.core.pull import (
    BROKEN,
    CACHED,
    CANCELLED,
    CLAIMING,
    COMMITTING,
    DIED,
    DRAINING,
    FAILED,
    FILLED,
    LATE,
    LEASE,
    LOST,
    MALFORMED,
    READING,
    REFUSED,
    RENEW_S,
    REPLY_S,
    SILENT,
    TAGS,
    UNANSWERED,
    UNPROVEN,
    UNREACHED,
    WAITING,
    Action,
    Ask,
    Borrower,
    CancelRead,
    StartRead,
)
from p2pdyn.core.types import NodeId
from p2pdyn.engines.base import Release, Reserved, Settle
from p2pdyn.wire.requests import Claim, Commit, Committed, Granted, Renew, Renewed, Return

OWNER, OTHER = NodeId("a" * 16), NodeId("b" * 16)
EPOCH = 5
KEY, LEASED = 7, 900
KEYS = tuple(bytes([number]) * 16 for number in range(1, 4))
NOTE = Reserved(KEY, 1, (20, 21, 22), KEYS)
TICKET = 1
BLOCK_BYTES = 25_000_000
READ_S = longest_read(3 * BLOCK_BYTES)
T = 100.0

RETURN = Ask(OWNER, Return(LEASED, EPOCH))
RENEW = Ask(OWNER, Renew(LEASED, EPOCH))
COMMIT = Ask(OWNER, Commit(TICKET, LEASED, EPOCH))
CANCEL = CancelRead(TICKET)
COMPUTE = Settle(KEY, 0)
COMPUTE_ELSEWHERE = Settle(KEY, 0, over=False)

REACHED = (WAITING, CLAIMING, READING, COMMITTING)
ENDS: dict[str, list[Action]] = {
    WAITING: [RETURN],
    CLAIMING: [COMPUTE, RETURN],
    READING: [CANCEL, COMPUTE_ELSEWHERE],
    COMMITTING: [COMPUTE, RETURN],
}
"""Whatever ends a pull of a lease, in each state: the engine computes, and the lease goes back once nobody reads."""


def u32(*numbers: int) -> bytes:
    return array("I", numbers).tobytes()


def granted(count: int = 3, lease: int = LEASED) -> Granted:
    return Granted(TICKET, lease, u32(*range(10, 10 + count)), u32(*range(4, 4 + count)))


def pull_in(state: str, lease: int = LEASED) -> Borrower:
    """A borrower with one pull in ``state``, all at time T."""
    borrower = Borrower(BLOCK_BYTES)
    borrower.begin(KEY, OWNER, EPOCH, lease, T)
    if state != WAITING:
        borrower.reserved(NOTE, T)
    if state in (READING, COMMITTING, DRAINING):
        borrower.granted(OWNER, granted(), T)
    if state == COMMITTING:
        borrower.read_over(TICKET, "", True, T)
    if state in (DRAINING, UNANSWERED):
        borrower.cancel(KEY, T)
    assert borrower.states() == {**dict.fromkeys(borrower.states(), 0), state: 1}
    return borrower


def ended(borrower: Borrower, outcome: str, reason: str = "") -> bool:
    """The pull is gone, and counted so."""
    assert borrower.tick(T + 1000) == []
    outcomes = {name: count for name, count in borrower.outcomes.items() if count}
    reasons = {name: count for name, count in borrower.failures.items() if count}
    assert (outcomes, reasons) == ({outcome: 1}, {reason: 1} if reason else {})
    return not borrower.pulls and borrower.next_deadline() is None


def given_up(borrower: Borrower, state: str, outcome: str, reason: str = "") -> None:
    """As :func:`ended`; a read that was under way comes to its end first."""
    if state == READING:
        assert borrower.read_over(TICKET, "cancelled", False, T + 60) == [Release(KEY), RETURN]
    assert ended(borrower, outcome, reason)


# As it should go


def test_a_pull_of_a_lease() -> None:
    borrower = Borrower(BLOCK_BYTES)
    assert borrower.begin(KEY, OWNER, EPOCH, LEASED, T) == [RENEW]
    assert borrower.reserved(NOTE, T + 0.1) == [Ask(OWNER, Claim(TICKET, LEASED, EPOCH, b"".join(KEYS)))]
    tags = tuple((key[:8], EPOCH, generation) for key, generation in zip(KEYS, (4, 5, 6), strict=True))
    read = StartRead(TICKET, OWNER, (10, 11, 12), (20, 21, 22), tags)
    assert borrower.granted(OWNER, granted(), T + 0.2) == [read]
    assert borrower.read_over(TICKET, "", True, T + 0.3) == [COMMIT]
    assert borrower.committed(OWNER, Committed(TICKET, True), T + 0.4) == [Settle(KEY, 3)]
    assert ended(borrower, FILLED)
    assert (borrower.blocks, borrower.bytes) == (3, 3 * BLOCK_BYTES)


def test_a_pull_of_a_prefix_learns_its_lease_with_the_blocks() -> None:
    borrower = Borrower(BLOCK_BYTES)
    assert borrower.begin(KEY, OWNER, EPOCH, 0, T) == []
    assert borrower.next_deadline() is None  # nothing is held for it
    assert borrower.reserved(NOTE, T + 60) == [Ask(OWNER, Claim(TICKET, 0, EPOCH, b"".join(KEYS)))]
    (read,) = borrower.granted(OWNER, granted(), T + 60.1)
    assert isinstance(read, StartRead)
    assert borrower.tick(T + 60.1 + RENEW_S) == [RENEW]
    assert borrower.read_over(TICKET, "", True, T + 61) == [COMMIT]
    assert borrower.committed(OWNER, Committed(TICKET, True), T + 61) == [Settle(KEY, 3)]
    assert ended(borrower, FILLED)


def test_fewer_blocks_than_asked_for_are_a_prefix() -> None:
    borrower = pull_in(CLAIMING)
    (read,) = borrower.granted(OWNER, granted(2), T)
    assert isinstance(read, StartRead)
    assert (read.remote, read.local, len(read.tags)) == ((10, 11), (20, 21), 2)
    borrower.read_over(TICKET, "", True, T)
    assert borrower.committed(OWNER, Committed(TICKET, True), T) == [Settle(KEY, 2)]
    assert borrower.blocks == 2


def test_what_was_cached_meanwhile_needs_no_pull() -> None:
    borrower = pull_in(WAITING)
    assert borrower.reserved(Reserved(KEY, 3, (), ()), T) == [RETURN]
    assert ended(borrower, CACHED)
    borrower = pull_in(WAITING, lease=0)
    assert borrower.reserved(Reserved(KEY, 3, (), ()), T) == []
    assert ended(borrower, CACHED)


# Renewals and the own deadline


@pytest.mark.parametrize("state", [WAITING, CLAIMING, READING])
def test_a_lease_is_renewed_while_it_is_needed(state: str) -> None:
    borrower = pull_in(state)
    assert borrower.next_deadline() == T + RENEW_S
    assert borrower.tick(T + RENEW_S - 0.01) == []
    assert borrower.tick(T + RENEW_S) == [RENEW]
    assert borrower.tick(T + RENEW_S) == []


def test_a_commit_under_way_is_not_mixed_with_renewals() -> None:
    borrower = pull_in(COMMITTING)
    assert borrower.tick(T + RENEW_S) == []
    assert borrower.renewed(OWNER, Renewed(LEASED, False), T + RENEW_S) == []  # overtaken: the commit ended the lease
    assert borrower.committed(OWNER, Committed(TICKET, True), T + RENEW_S) == [Settle(KEY, 3)]


def test_a_lease_counts_from_when_what_was_answered_was_sent() -> None:
    borrower = pull_in(WAITING)
    for renewals in range(1, 4):
        assert borrower.tick(T + renewals * RENEW_S) == [RENEW]
    now = T + 1.9
    for _ in range(3):  # it answers three of four: of which, it does not say
        assert borrower.renewed(OWNER, Renewed(LEASED, True), now) == []
    assert borrower.tick(T + 2 * RENEW_S + LEASE_S - 0.01) == [RENEW]
    assert borrower.tick(T + 2 * RENEW_S + LEASE_S) == [RETURN]
    assert ended(borrower, FAILED, LEASE)


def test_an_answer_to_the_claim_counts_from_the_claim() -> None:
    borrower = pull_in(WAITING)
    borrower.reserved(NOTE, T + 1)
    borrower.granted(OWNER, granted(), T + 1.9)
    assert borrower.tick(T + 1 + LEASE_S - 0.01) == [RENEW]
    assert borrower.tick(T + 1 + LEASE_S) == ENDS[READING]
    given_up(borrower, READING, FAILED, LEASE)


@pytest.mark.parametrize("state", REACHED)
def test_whoever_stood_still_uses_nothing(state: str) -> None:
    """What came meanwhile is looked at, and comes too late."""
    late = T + LEASE_S
    events: tuple[Callable[[Borrower], list[Action]], ...] = (
        lambda borrower: borrower.granted(OWNER, granted(), late),
        lambda borrower: borrower.renewed(OWNER, Renewed(LEASED, True), late),
        lambda borrower: borrower.committed(OWNER, Committed(TICKET, True), late),
        lambda borrower: borrower.tick(late),
    )
    for event in events:
        borrower = pull_in(state)
        assert event(borrower) == ENDS[state]
        given_up(borrower, state, FAILED, LEASE)


def test_what_was_reserved_or_read_during_a_pause_is_of_no_use() -> None:
    late = T + LEASE_S
    borrower = pull_in(WAITING)
    assert borrower.reserved(NOTE, late) == [RETURN, COMPUTE]
    assert ended(borrower, FAILED, LEASE)
    borrower = pull_in(READING)
    assert borrower.read_over(TICKET, "", True, late) == [*ENDS[READING], Release(KEY), RETURN]
    assert ended(borrower, FAILED, LEASE)


@pytest.mark.parametrize("state", [WAITING, CLAIMING, READING])
def test_a_lease_that_has_ended_is_given_up_at_once(state: str) -> None:
    borrower = pull_in(state)
    assert borrower.renewed(OWNER, Renewed(LEASED, False), T) == ENDS[state]
    given_up(borrower, state, FAILED, LEASE)


# What goes wrong


@pytest.mark.parametrize("state", REACHED)
def test_a_cancelled_sequence_gives_its_lease_back(state: str) -> None:
    borrower = pull_in(state)
    assert borrower.cancel(KEY, T) == ENDS[state]
    assert borrower.cancel(KEY, T) == []
    given_up(borrower, state, CANCELLED)


@pytest.mark.parametrize("state", REACHED)
def test_a_source_that_cannot_be_met_is_done_without(state: str) -> None:
    borrower = pull_in(state)
    assert borrower.cannot(KEY, T) == ENDS[state]
    given_up(borrower, state, FAILED, UNREACHED)


@pytest.mark.parametrize("state", REACHED)
def test_a_lost_source_gets_nothing_back(state: str) -> None:
    borrower = pull_in(state)
    assert borrower.source_lost(OTHER, T) == []
    assert borrower.source_lost(OWNER, T) == [action for action in ENDS[state] if action != RETURN]
    if state == READING:
        assert borrower.read_over(TICKET, "", True, T) == [Release(KEY)]
    assert ended(borrower, FAILED, LOST)


def test_a_source_lost_while_a_read_drains_gets_nothing_back() -> None:
    borrower = pull_in(DRAINING)
    assert borrower.source_lost(OWNER, T) == []
    assert borrower.read_over(TICKET, "", True, T) == [Release(KEY)]
    assert ended(borrower, CANCELLED)


@pytest.mark.parametrize("state", REACHED)
def test_a_dead_engine_is_told_nothing(state: str) -> None:
    borrower = pull_in(state)
    assert borrower.clear(T) == [action for action in ENDS[state] if not isinstance(action, Settle)]
    if state == READING:
        assert borrower.read_over(TICKET, "cancelled", False, T) == [RETURN]
    assert ended(borrower, FAILED, DIED)


def test_blocks_reserved_for_a_pull_that_has_ended_go_back() -> None:
    borrower = pull_in(WAITING)
    borrower.cancel(KEY, T)
    assert borrower.reserved(NOTE, T) == [COMPUTE]
    assert borrower.reserved(Reserved(KEY, 3, (), ()), T) == []


@pytest.mark.parametrize("lease", [0, LEASED])
def test_a_refusal_is_not_asked_again(lease: int) -> None:
    borrower = pull_in(CLAIMING, lease)
    back = [RETURN] if lease else []
    assert borrower.granted(OWNER, Granted(TICKET, 0, b"", b"", "it is gone"), T) == [COMPUTE, *back]
    assert ended(borrower, FAILED, REFUSED)


@pytest.mark.parametrize(
    "answer",
    [
        granted(4),
        granted(lease=LEASED + 1),
        granted(lease=0),
        Granted(TICKET, LEASED, u32(1, 2), u32(1)),
        Granted(TICKET, LEASED, u32(1), u32(1, 2)),
        Granted(TICKET, LEASED, b"12345", b"12345"),
        Granted(TICKET, LEASED, u32(1), b""),
    ],
)
def test_an_answer_that_cannot_be_is_nothing_to_read_by(answer: Granted) -> None:
    borrower = pull_in(CLAIMING)
    assert borrower.granted(OWNER, answer, T) == [COMPUTE, RETURN]
    assert ended(borrower, FAILED, MALFORMED)


def test_a_prefix_granted_without_a_lease_is_nothing_to_read_by() -> None:
    borrower = pull_in(CLAIMING, lease=0)
    assert borrower.granted(OWNER, granted(lease=0), T) == [COMPUTE]
    assert ended(borrower, FAILED, MALFORMED)


@pytest.mark.parametrize(("error", "right", "reason"), [("broken", False, BROKEN), ("", False, TAGS)])
def test_a_failed_read_and_a_wrong_tag_are_misses(error: str, right: bool, reason: str) -> None:
    borrower = pull_in(READING)
    assert borrower.read_over(TICKET, error, right, T) == [COMPUTE, RETURN]
    assert ended(borrower, FAILED, reason)


def test_what_was_not_held_is_not_used() -> None:
    borrower = pull_in(COMMITTING)
    assert borrower.committed(OWNER, Committed(TICKET, False), T) == [COMPUTE, RETURN]
    assert ended(borrower, FAILED, UNPROVEN)


@pytest.mark.parametrize("state", [CLAIMING, COMMITTING])
def test_an_owner_that_does_not_answer_is_done_without(state: str) -> None:
    borrower = pull_in(state)
    borrower.tick(T + REPLY_S - 0.01)
    assert borrower.tick(T + REPLY_S) == ENDS[state]
    assert ended(borrower, FAILED, SILENT)
    assert borrower.committed(OWNER, Committed(TICKET, True), T + REPLY_S) == []
    assert borrower.granted(OWNER, granted(), T + REPLY_S) == []


def test_a_read_that_takes_too_long_is_cancelled() -> None:
    borrower = pull_in(READING)
    now = T
    while now + RENEW_S < T + READ_S:
        now += RENEW_S
        assert borrower.tick(now) == [RENEW]
        borrower.renewed(OWNER, Renewed(LEASED, True), now)
    assert borrower.tick(T + READ_S) == ENDS[READING]
    assert borrower.states()[DRAINING] == 1
    assert borrower.next_deadline() is None
    assert borrower.tick(T + 60) == []  # not renewed, and not over before the mover says so
    given_up(borrower, READING, FAILED, LATE)


def test_a_grant_that_comes_too_late_is_given_back() -> None:
    borrower = pull_in(UNANSWERED, lease=0)
    assert borrower.granted(OWNER, granted(), T + 1) == [RETURN]
    assert ended(borrower, CANCELLED)
    borrower = pull_in(UNANSWERED, lease=0)
    assert borrower.granted(OWNER, Granted(TICKET, 0, b"", b"", "no"), T + 1) == []
    assert ended(borrower, CANCELLED)


def test_a_grant_is_not_waited_for_longer_than_it_holds() -> None:
    borrower = pull_in(UNANSWERED, lease=0)
    assert borrower.next_deadline() == T + REPLY_S  # early
    assert borrower.tick(T + REPLY_S) == []
    assert borrower.next_deadline() == T + LEASE_S
    assert borrower.tick(T + LEASE_S) == []
    assert ended(borrower, CANCELLED)
    borrower = pull_in(UNANSWERED, lease=0)
    assert borrower.source_lost(OWNER, T) == []
    assert ended(borrower, CANCELLED)


# Who may say what


@pytest.mark.parametrize("state", [WAITING, CLAIMING, READING, COMMITTING, DRAINING])
def test_only_the_source_answers(state: str) -> None:
    borrower = pull_in(state)
    assert borrower.granted(OTHER, granted(), T) == []
    assert borrower.renewed(OTHER, Renewed(LEASED, False), T) == []
    assert borrower.committed(OTHER, Committed(TICKET, True), T) == []
    assert borrower.states()[state] == 1


def test_answers_to_what_was_not_asked_say_nothing() -> None:
    borrower = pull_in(READING)
    assert borrower.granted(OWNER, granted(), T) == []
    assert borrower.committed(OWNER, Committed(TICKET, True), T) == []
    assert borrower.read_over(9, "", True, T) == []
    borrower.renewed(OWNER, Renewed(LEASED, True), T)
    assert borrower.renewed(OWNER, Renewed(LEASED, False), T) == []  # one Renew, two answers
    assert borrower.states()[READING] == 1


def test_a_lease_that_another_pull_has_is_not_claimed_twice() -> None:
    borrower = pull_in(DRAINING)
    assert borrower.begin(KEY + 1, OWNER, EPOCH, LEASED, T) == []
    assert borrower.failures[LEASE] == 1
    assert borrower.reserved(Reserved(KEY + 1, 0, (30,), KEYS[:1]), T) == [Settle(KEY + 1, 0)]
    borrower = pull_in(CLAIMING, lease=0)
    borrower.begin(KEY + 1, OWNER, EPOCH, LEASED, T)
    actions = borrower.granted(OWNER, granted(), T)  # a number that the owner cannot have drawn twice
    assert actions == [COMPUTE]
    assert set(borrower.pulls) == {KEY + 1}


def test_pulls_do_not_mix() -> None:
    borrower = Borrower(BLOCK_BYTES)
    for key in (1, 2):
        borrower.begin(key, OWNER, EPOCH, 0, T)
        borrower.reserved(Reserved(key, 0, (key,), KEYS[:1]), T)
    reads = [borrower.granted(OWNER, Granted(ticket, 100 + ticket, u32(5), u32(1)), T) for ticket in (2, 1)]
    assert [_tickets(read) for read in reads] == [[2], [1]]
    assert borrower.read_over(2, "", True, T) == [Ask(OWNER, Commit(2, 102, EPOCH))]
    assert borrower.cancel(1, T) == [CancelRead(1), Settle(1, 0, over=False)]
    assert borrower.committed(OWNER, Committed(2, True), T) == [Settle(2, 1)]
    assert borrower.read_over(1, "cancelled", False, T) == [Release(1), Ask(OWNER, Return(101, EPOCH))]
    assert (borrower.outcomes[FILLED], borrower.outcomes[CANCELLED]) == (1, 1)


def _tickets(actions: Sequence[Action]) -> list[int]:
    return [action.ticket for action in actions if isinstance(action, StartRead)]
