"""The index against plain sets of the same blocks."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pdyn.core import kvindex
from p2pdyn.core.kvindex import KvIndex, Match

KEYS = st.integers(1, 12)
TIER = st.integers(0, 2)
WHO = st.integers(0, 4)
FEW = st.one_of(st.lists(KEYS, max_size=4), st.lists(KEYS, min_size=20, max_size=24))


def hashes(*keys: int) -> array[int]:
    return array("Q", keys)


class Sets(RuleBasedStateMachine):
    """Five targets that come and go; ``truth`` is what each holds."""

    def __init__(self) -> None:
        super().__init__()
        self.index = KvIndex(max_blocks=200)
        self.slots: dict[int, int] = {}
        self.truth: dict[int, set[tuple[int, int]]] = {}

    @rule(who=WHO)
    def come(self, who: int) -> None:
        if who not in self.slots:
            self.slots[who] = self.index.add()
            self.truth[who] = set()

    @rule(who=WHO)
    def leave(self, who: int) -> None:
        if who in self.slots:
            self.truth.pop(who)
            self.index.drop(self.slots[who])
            self.index.drop(self.slots.pop(who))

    @rule(who=WHO, tier=TIER, keys=st.lists(KEYS, max_size=8), stores=st.booleans())
    def change(self, who: int, tier: int, keys: list[int], stores: bool) -> None:
        if who not in self.slots:
            return
        held = self.truth[who]
        named = {(key, tier) for key in keys}
        changed = named - held if stores else named & held
        self.truth[who] = held | named if stores else held - named
        act = self.index.store if stores else self.index.remove
        same = Counter(keys) - Counter(key for key, _ in changed)
        assert Counter(act(self.slots[who], tier, hashes(*keys))) == same

    @rule(who=WHO, gone=FEW, come=FEW)
    def swap(self, who: int, gone: list[int], come: list[int]) -> None:
        if who not in self.slots:
            return
        held = self.truth[who]
        left, new = {(key, 0) for key in gone}, {(key, 0) for key in come}
        after = held - left | new
        said = self.index.swap(self.slots[who], gone, come)
        if said is None:
            assert len(come) > self.index.room()
            return
        self.truth[who] = after
        same = Counter(gone) - Counter(key for key, _ in left & held)
        same += Counter(come) - Counter(key for key, _ in new - (held - left))
        assert (said[0], Counter(said[1])) == (len(after) - len(held), same)

    @rule(count=st.integers(0, 5))
    def ask_for_room(self, count: int) -> None:
        assert self.index.fits(count) == (count <= self.index.room())

    @rule(budget=st.integers(1, 6))
    def sweep(self, budget: int) -> None:
        self.index.sweep(budget)

    @rule()
    def sweep_all(self) -> None:
        while not self.index.sweep(3):
            pass
        assert len(self.index) == len(set().union(*self.truth.values()))

    @rule(prompt=st.lists(KEYS, max_size=8), among=st.sets(WHO))
    def look(self, prompt: list[int], among: set[int]) -> None:
        mask = sum(1 << self.slots[target] for target in among if target in self.slots)
        found = self.index.match(prompt, mask)
        for target, slot in self.slots.items():
            assert self.told(found, slot) == (self.expected(target, prompt) if target in among else (0, 0, 0))
        assert set(found.blocks) <= set(self.slots.values())
        assert all([*found.blocks.values(), *found.host.values(), *found.disk.values()])

    @staticmethod
    def told(found: Match, slot: int) -> tuple[int, int, int]:
        return found.device(slot), found.host.get(slot, 0), found.disk.get(slot, 0)

    def expected(self, target: int, prompt: list[int]) -> tuple[int, int, int]:
        counts = [0, 0, 0]
        for key in prompt:
            tiers = [tier for tier in range(3) if (key, tier) in self.truth[target]]
            if not tiers:
                break
            counts[tiers[0]] += 1
        return counts[0], counts[1], counts[2]

    @invariant()
    def each_holds_what_it_should(self) -> None:
        assert len(set(self.slots.values())) == len(self.slots)
        for target, slot in self.slots.items():
            assert self.index.held(slot) == self.truth[target]


TestSets = Sets.TestCase
TestSets.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_target_that_left_is_not_found_and_its_slot_is_free_only_after_the_sweep() -> None:
    index = KvIndex()
    first = index.add()
    index.store(first, 0, hashes(*range(1, 10)))
    index.drop(first)

    assert index.match([1, 2], -1) == Match()
    assert index.held(first) == set()
    assert index.add() != first
    assert not index.sweep(4)
    assert index.add() != first
    while not index.sweep(4):
        pass
    assert len(index) == 0
    assert index.add() == first


def test_one_that_leaves_during_a_sweep_waits_for_the_next() -> None:
    index = KvIndex()
    first, second = index.add(), index.add()
    index.store(first, 0, hashes(1, 2))
    index.store(second, 0, hashes(2, 3))
    index.drop(first)
    assert not index.sweep(1)
    index.drop(second)

    assert not index.sweep()
    assert index.add() == first
    assert index.sweep()
    assert index.add() == second
    assert len(index) == 0


def test_a_target_that_is_not_live_changes_nothing() -> None:
    index = KvIndex()
    slot = index.add()
    index.drop(slot)

    assert index.store(slot, 0, hashes(1)) == [1]
    assert index.remove(slot, 0, hashes(1)) == [1]
    assert len(index) == 0


def test_slots_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvindex, "MAX_SLOTS", 3)
    index = KvIndex()
    slots = [index.add() for _ in range(3)]
    with pytest.raises(OverflowError):
        index.add()
    index.store(slots[1], 0, hashes(1, 2))
    index.drop(slots[1])

    assert index.add() == slots[1]
    assert index.held(slots[1]) == set()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 192, 193, 1000])
def test_long_prompts_are_walked_to_their_end(length: int) -> None:
    """Lengths at which the walk goes on in another piece."""
    rng = random.Random(length)
    prompt = [rng.getrandbits(64) for _ in range(length)]
    index = KvIndex()
    slots = {index.add(): held for held in (0, 1, length // 2, length - 1, length)}
    for slot, held in slots.items():
        index.store(slot, 0, hashes(*prompt[:held]))

    assert index.match(prompt, -1).blocks == {slot: held for slot, held in slots.items() if held}
    for slot, held in slots.items():
        index.store(slot, 1, hashes(*prompt[held:]))
    found = index.match(prompt, -1)
    assert found.blocks == dict.fromkeys(slots, length)
    assert found.host == {slot: length - held for slot, held in slots.items() if held < length}


OTHERS = range(1, 7)
"""Blocks that another target holds."""


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param([11, 12, 13], id="all new"),
        pytest.param([11, 12, 11], id="all new, one twice"),
        pytest.param([1, 2, 3], id="all shared"),
        pytest.param([1, 2, 1], id="all shared, one twice"),
        pytest.param([1, 2, 11, 12], id="shared, then new"),
        pytest.param([1, 2, 11, 11], id="shared, then new, one twice"),
        pytest.param([1, 1, 11, 12], id="shared, one twice, then new"),
        pytest.param([11, 1, 2, 12], id="new, shared, new"),
        pytest.param([1, 2, 5, 6, 11], id="shared by one, by two, then new"),
        pytest.param([8, 9], id="its own"),
        pytest.param([8, 11, 12], id="its own, then new"),
        pytest.param([1, 8, 11, 8, 11, 6], id="some of each, some twice"),
    ],
)
@pytest.mark.parametrize("tier", [0, 2])
def test_a_batch_counts_what_it_changes_however_it_is_mixed(batch: list[int], tier: int) -> None:
    index = KvIndex()
    other, third, slot = (index.add() for _ in range(3))
    index.store(other, tier, hashes(*OTHERS))
    index.store(third, tier, hashes(5, 6))
    index.store(slot, tier, hashes(8, 9))

    told = index.store(slot, tier, tuple(batch))
    assert Counter(told) == Counter(batch) - Counter({one for one in batch if one not in (8, 9)})
    assert index.held(slot) == {(one, tier) for one in (8, 9, *batch)}
    told = index.remove(slot, tier, tuple(batch))
    assert Counter(told) == Counter(batch) - Counter(set(batch))
    assert index.held(slot) == {(one, tier) for one in (8, 9) if one not in batch}
    assert index.held(other) == {(one, tier) for one in OTHERS}
    assert index.held(third) == {(5, tier), (6, tier)}
    assert len(index) == len({*OTHERS, *{8, 9}.difference(batch)})


def test_room_counts_entries() -> None:
    index = KvIndex(max_blocks=3)
    slots = index.add(), index.add()
    for slot in slots:
        index.store(slot, 0, hashes(1, 2))

    assert index.room() == 1
    assert index.fits(1)
    assert not index.fits(2)
