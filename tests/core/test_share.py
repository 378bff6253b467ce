"""A bounded amount that nobody takes away from the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdyn.core.share import Share


def fill(share: Share, who: str) -> int:
    """Take one at a time while it is allowed."""
    taken = 0
    while share.allows(who):
        share.take(who)
        taken += 1
    return taken


@pytest.mark.parametrize(("greed", "first", "second"), [(1, 50, 25), (3, 75, 19)])
def test_one_alone_leaves_room_for_the_next(greed: int, first: int, second: int) -> None:
    share = Share(100, greed)
    assert fill(share, "a") == first
    assert fill(share, "b") == second
    assert share.allows("c")


def test_the_last_of_a_small_amount_is_given_too() -> None:
    share = Share(2, greed=3)
    assert fill(share, "a") == 2
    assert not share.allows("b")
    share.give("a")
    assert share.allows("b")


@given(
    limit=st.integers(1, 60),
    greed=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 20), st.booleans())),
)
def test_it_adds_up_and_the_limit_holds(limit: int, greed: int, steps: list[tuple[str, int, bool]]) -> None:
    share, held = Share(limit, greed), dict.fromkeys("abcd", 0)
    for who, amount, back in steps:
        if back and held[who]:
            amount = min(amount, held[who])
            share.give(who, amount)
            held[who] -= amount
        elif share.allows(who, amount):
            assert held[who] + amount <= greed * (limit - sum(held.values()))
            share.take(who, amount)
            held[who] += amount
        assert share.total == sum(held.values()) <= limit
        assert share.held == {who: amount for who, amount in held.items() if amount}
