"""The owner's leases, state by state: what each message gets in each of them, and what the engine is told."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest

from p2pdyn.core.lease import (
    CLAIMED,
    GRANTED,
    LEASE_S,
    MAX_LEASES,
    PIN_S,
    QUARANTINED,
    Action,
    Lender,
    Reply,
    longest_read,
)
from p2pdyn.engines.base import Held, Pin, Release
from p2pdyn.wire.requests import Claim, Commit, Committed, Granted, Renew, Renewed, Return

EPOCH = 5
ONE, TWO = b"\x00one", b"\x00two"
KEYS = tuple(bytes([number]) * 16 for number in range(1, 5))
HELD = Held(1, (10, 11, 12, 13), (7, 7, 8, 9), KEYS)
READ_S = longest_read(4 * 1000)
T = 100.0


def u32(*numbers: int) -> bytes:
    return array("I", numbers).tobytes()


def make(kv_blocks: int = 100) -> Lender:
    return Lender(EPOCH, iter((0, 500, 500, *range(501, 600_000))).__next__, kv_blocks, 1000)


def lease_in(state: str) -> tuple[Lender, int]:
    """A lender with HELD under a lease in ``state``, at time T."""
    lender = make()
    number, actions = lender.handed_over(HELD, T)
    assert actions == []
    if state != GRANTED:
        claim(lender, ONE, number, T)
    if state == QUARANTINED:
        assert lender.cancel(number, T) == []
    assert lender.states() == {GRANTED: 0, CLAIMED: 0, QUARANTINED: 0, state: 1}
    return lender, number


def claim(
    lender: Lender, connection: bytes, lease: int, now: float, keys: Sequence[bytes] = KEYS, epoch: int = EPOCH
) -> list[Action]:
    return lender.claim(connection, Claim(3, lease, epoch, b"".join(keys)), now)


def refused(actions: Sequence[Action], ticket: int = 3) -> str:
    """The reason of the one action, a refused claim."""
    (reply,) = actions
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Granted)
    assert (reply.message.ticket, reply.message.lease) == (ticket, 0)
    assert reply.message.blocks == reply.message.generations == b""
    return reply.message.reason


# One lease


def test_what_is_handed_over_is_claimed_and_committed() -> None:
    lender = make()
    assert lender.handed_over(HELD, T) == (500, [])  # not 0: that means none
    assert lender.blocks == 4
    granted = Granted(3, 500, u32(10, 11, 12, 13), u32(7, 7, 8, 9))
    assert claim(lender, ONE, 500, T + 1) == [Reply(ONE, granted)]
    assert lender.renew(ONE, Renew(500, EPOCH), T + 2) == [Reply(ONE, Renewed(500, True))]
    assert lender.commit(ONE, Commit(3, 500, EPOCH), T + 3) == [Reply(ONE, Committed(3, True)), Release(1)]
    assert lender.states() == {GRANTED: 0, CLAIMED: 0, QUARANTINED: 0}
    assert (lender.blocks, lender.expired, lender.quarantined, lender.refusals) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("keys", "blocks", "generations"),
    [
        (KEYS[1:], (11, 12, 13), (7, 8, 9)),
        (KEYS[2:3], (12,), (8,)),
        ((*KEYS[1:3], b"?" * 16), (11, 12), (7, 8)),
        ((*KEYS[2:], b"?" * 16), (12, 13), (8, 9)),
        ((KEYS[0], KEYS[2]), (10,), (7,)),
    ],
)
def test_a_claim_gets_as_long_a_run_of_its_keys_as_is_known(
    keys: tuple[bytes, ...], blocks: tuple[int, ...], generations: tuple[int, ...]
) -> None:
    lender, number = lease_in(GRANTED)
    assert claim(lender, ONE, number, T, keys) == [Reply(ONE, Granted(3, number, u32(*blocks), u32(*generations)))]


@pytest.mark.parametrize("keys", [(), (b"?" * 16,), (b"?" * 16, *KEYS)])
def test_a_claim_of_other_keys_gets_none_and_changes_nothing(keys: tuple[bytes, ...]) -> None:
    lender, number = lease_in(GRANTED)
    assert refused(claim(lender, ONE, number, T, keys)) == "the lease is for other blocks"
    assert lender.states()[GRANTED] == 1
    assert lender.refusals == 1


def test_a_claim_may_be_repeated() -> None:
    lender, number = lease_in(CLAIMED)
    (again,) = claim(lender, ONE, number, T + 1, KEYS[:1])
    assert again == Reply(ONE, Granted(3, number, u32(10), u32(7)))


@pytest.mark.parametrize("state", [CLAIMED, QUARANTINED])
def test_another_connection_has_no_say(state: str) -> None:
    lender, number = lease_in(state)
    assert refused(claim(lender, TWO, number, T)) == "the lease has ended"
    assert lender.renew(TWO, Renew(number, EPOCH), T) == [Reply(TWO, Renewed(number, False))]
    assert lender.commit(TWO, Commit(4, number, EPOCH), T) == [Reply(TWO, Committed(4, False))]
    assert lender.give_back(TWO, Return(number, EPOCH), T) == []
    assert lender.states()[state] == 1


@pytest.mark.parametrize("state", [GRANTED, CLAIMED, QUARANTINED])
def test_another_epoch_means_another_life(state: str) -> None:
    lender, number = lease_in(state)
    assert refused(claim(lender, ONE, number, T, epoch=EPOCH - 1)) == "the owner has epoch 5 by now"
    assert lender.renew(ONE, Renew(number, EPOCH - 1), T) == [Reply(ONE, Renewed(number, False))]
    assert lender.commit(ONE, Commit(4, number, EPOCH - 1), T) == [Reply(ONE, Committed(4, False))]
    assert lender.give_back(ONE, Return(number, EPOCH - 1), T) == []
    assert lender.states()[state] == 1


def test_unknown_leases_are_refused() -> None:
    lender = make()
    assert refused(claim(lender, ONE, 9, T)) == "the lease has ended"
    assert lender.renew(ONE, Renew(9, EPOCH), T) == [Reply(ONE, Renewed(9, False))]
    assert lender.commit(ONE, Commit(4, 9, EPOCH), T) == [Reply(ONE, Committed(4, False))]
    assert lender.give_back(ONE, Return(9, EPOCH), T) == []
    assert lender.cancel(9, T) == []


def test_what_nobody_claimed_cannot_be_committed() -> None:
    lender, number = lease_in(GRANTED)
    assert lender.commit(ONE, Commit(4, number, EPOCH), T) == [Reply(ONE, Committed(4, False))]
    assert lender.states()[GRANTED] == 1


def test_whoever_waits_renews_before_anybody_claims() -> None:
    lender, number = lease_in(GRANTED)
    assert lender.renew(ONE, Renew(number, EPOCH), T + 1.5) == [Reply(ONE, Renewed(number, True))]
    assert lender.tick(T + LEASE_S) == []
    assert lender.states()[GRANTED] == 1
    assert lender.renew(TWO, Renew(number, EPOCH), T + 3) == [Reply(TWO, Renewed(number, True))]


@pytest.mark.parametrize("state", [GRANTED, CLAIMED, QUARANTINED])
def test_a_return_ends_it(state: str) -> None:
    lender, number = lease_in(state)
    assert lender.give_back(ONE, Return(number, EPOCH), T) == [Release(1)]
    assert lender.blocks == 0


# Its end by time


def test_a_granted_lease_ends_when_it_expires() -> None:
    lender, _ = lease_in(GRANTED)
    assert lender.next_deadline() == T + LEASE_S
    assert lender.tick(T + LEASE_S - 0.01) == []
    assert lender.tick(T + LEASE_S) == [Release(1)]
    assert lender.next_deadline() is None
    assert (lender.expired, lender.quarantined) == (1, 0)


def test_a_claimed_lease_waits_for_the_read_that_may_run() -> None:
    lender, _ = lease_in(CLAIMED)
    assert lender.tick(T + LEASE_S) == []
    assert lender.states()[QUARANTINED] == 1
    assert lender.holds(10)
    assert lender.next_deadline() == T + LEASE_S + READ_S
    assert lender.tick(T + LEASE_S + READ_S) == [Release(1)]
    assert not lender.holds(10)
    assert (lender.expired, lender.quarantined) == (1, 1)


def test_the_longest_read_grows_with_the_bytes() -> None:
    assert longest_read(0) == 1.0
    assert longest_read(100_000_000) == 3.0


def test_in_quarantine_nothing_is_granted_renewed_or_committed() -> None:
    lender, number = lease_in(QUARANTINED)
    until = lender.next_deadline()
    assert refused(claim(lender, ONE, number, T + 1)) == "the lease has ended"
    assert lender.renew(ONE, Renew(number, EPOCH), T + 1) == [Reply(ONE, Renewed(number, False))]
    assert lender.next_deadline() == until
    assert lender.commit(ONE, Commit(4, number, EPOCH), T + 1) == [Reply(ONE, Committed(4, False)), Release(1)]


def test_an_owner_that_stood_still_lets_expire_what_has_before_it_listens() -> None:
    late = T + LEASE_S
    for state, told in ((GRANTED, [Release(1)]), (CLAIMED, [])):
        lender, number = lease_in(state)
        assert lender.renew(ONE, Renew(number, EPOCH), late) == [*told, Reply(ONE, Renewed(number, False))]
    lender, number = lease_in(CLAIMED)
    assert lender.commit(ONE, Commit(4, number, EPOCH), late) == [Reply(ONE, Committed(4, False)), Release(1)]
    lender, number = lease_in(CLAIMED)
    assert refused(claim(lender, ONE, number, late)) == "the lease has ended"
    lender, number = lease_in(CLAIMED)
    later = late + READ_S
    assert lender.commit(ONE, Commit(4, number, EPOCH), later) == [Release(1), Reply(ONE, Committed(4, False))]


# Its end by others


def test_a_cancel_ends_what_nobody_reads_and_quarantines_the_rest() -> None:
    lender, number = lease_in(GRANTED)
    assert lender.cancel(number, T) == [Release(1)]
    lender, number = lease_in(CLAIMED)
    assert lender.cancel(number, T + 1) == []
    assert lender.cancel(number, T + 1) == []
    assert lender.quarantined == 1
    assert (
        lender.tick(T + LEASE_S + READ_S - 0.01) == []
    )  # a Granted may still be on its way, then the read takes READ_S
    assert lender.tick(T + LEASE_S + READ_S) == [Release(1)]
    assert lender.expired == 0


def test_a_raised_epoch_stops_every_lease() -> None:
    lender, claimed = lease_in(CLAIMED)
    granted, _ = lender.handed_over(Held(2, (20,), (1,), KEYS[:1]), T)
    (pin,) = claim(lender, TWO, 0, T)
    actions = lender.raise_epoch(EPOCH + 1, T)
    assert actions[0] == Release(2)
    assert refused(actions[1:]) == "the owner's epoch was raised"
    assert lender.states() == {GRANTED: 0, CLAIMED: 0, QUARANTINED: 1}
    assert lender.commit(ONE, Commit(4, claimed, EPOCH), T) == [Reply(ONE, Committed(4, False))]
    assert lender.renew(ONE, Renew(granted, EPOCH + 1), T) == [Reply(ONE, Renewed(granted, False))]
    assert isinstance(pin, Pin)
    assert lender.pinned(Held(pin.key, (30,), (1,), KEYS[:1]), T) == [Release(pin.key)]
    assert lender.tick(T + LEASE_S + READ_S) == [Release(1)]


def test_a_dead_engine_is_told_nothing_and_what_it_lent_is_not_held() -> None:
    lender, number = lease_in(CLAIMED)
    claim(lender, TWO, 0, T)
    assert refused(lender.engine_died()) == "the engine died"
    assert (lender.blocks, sum(lender.states().values())) == (0, 0)
    assert lender.commit(ONE, Commit(4, number, EPOCH), T) == [Reply(ONE, Committed(4, False))]
    assert lender.tick(T + 100) == []
    assert lender.next_deadline() is None


# Prefixes


def test_a_prefix_is_pinned_and_granted_at_once() -> None:
    lender = make()
    assert claim(lender, ONE, 0, T) == [Pin(-1, KEYS)]
    assert claim(lender, TWO, 0, T, KEYS[:2]) == [Pin(-2, KEYS[:2])]
    held = Held(-1, (10, 11), (7, 8), KEYS[:2])
    assert lender.pinned(held, T + 0.1) == [Reply(ONE, Granted(3, 500, u32(10, 11), u32(7, 8)))]
    assert lender.pinned(Held(-2, (10,), (7,), KEYS[:1]), T + 0.2) == [Reply(TWO, Granted(3, 501, u32(10), u32(7)))]
    assert lender.states() == {GRANTED: 0, CLAIMED: 2, QUARANTINED: 0}
    assert lender.commit(ONE, Commit(3, 500, EPOCH), T + 1) == [Reply(ONE, Committed(3, True)), Release(-1)]


def test_a_prefix_that_is_not_cached_is_refused() -> None:
    lender = make()
    claim(lender, ONE, 0, T)
    released, *refusal = lender.pinned(Held(-1), T)
    assert released == Release(-1)
    assert refused(refusal) == "the blocks are not in the cache"
    assert lender.refusals == 1


def test_an_engine_that_takes_too_long_pins_for_nobody() -> None:
    lender = make()
    claim(lender, ONE, 0, T)
    assert lender.next_deadline() == T + PIN_S
    assert lender.tick(T + PIN_S - 0.01) == []
    assert refused(lender.tick(T + PIN_S)) == "the engine is busy"
    assert lender.next_deadline() is None
    assert lender.pinned(Held(-1, (10,), (7,), KEYS[:1]), T + 1) == [Release(-1)]
    assert lender.blocks == 0


@pytest.mark.parametrize(
    ("lease", "epoch", "keys"), [(0, EPOCH + 1, KEYS), (0, EPOCH, ())], ids=["another epoch", "no key"]
)
def test_nothing_is_pinned_for_a_claim_that_cannot_be(lease: int, epoch: int, keys: tuple[bytes, ...]) -> None:
    assert refused(claim(make(), ONE, lease, T, keys, epoch))


# Room


def test_a_prompt_without_a_full_block_is_not_held() -> None:
    lender = make()
    assert lender.handed_over(Held(1), T) == (0, [Release(1)])
    assert lender.refusals == 0


def test_at_most_half_of_the_blocks_are_lent() -> None:
    lender = make(kv_blocks=10)
    assert lender.handed_over(HELD, T)[0]
    assert lender.handed_over(Held(2, (20, 21), (1, 1), KEYS[:2]), T) == (0, [Release(2)])
    assert lender.refusals == 1
    assert claim(lender, ONE, 0, T) == [Pin(-1, KEYS[:1])]  # as many as there is room for
    assert refused(claim(lender, TWO, 0, T)) == "too much of the cache is lent already"
    assert lender.handed_over(Held(3, (20,), (1,), KEYS[:1]), T) == (0, [Release(3)])


def test_a_block_in_several_leases_counts_once_and_is_held_until_the_last_ends() -> None:
    lender = make(kv_blocks=10)
    first, _ = lender.handed_over(HELD, T)
    second, _ = lender.handed_over(Held(2, (10, 11, 12), (7, 7, 8), KEYS[:3]), T)
    assert lender.blocks == 4
    assert lender.cancel(first, T) == [Release(1)]
    assert [lender.holds(block) for block in (9, 10, 13)] == [False, True, False]
    assert lender.cancel(second, T) == [Release(2)]
    assert lender.blocks == 0


def test_leases_and_pins_are_counted_together() -> None:
    lender = make(kv_blocks=10 * MAX_LEASES)
    for key in range(1, MAX_LEASES):
        assert lender.handed_over(Held(key, (key,), (1,), KEYS[:1]), T)[0]
    assert claim(lender, ONE, 0, T) == [Pin(-1, KEYS)]
    assert refused(claim(lender, ONE, 0, T)) == "too much of the cache is lent already"
    assert lender.handed_over(Held(MAX_LEASES, (MAX_LEASES,), (1,), KEYS[:1]), T) == (0, [Release(MAX_LEASES)])
