"""Which target holds which blocks: one flat map a tier, from sequence hash to an int used as a set of targets.

A sequence hash names a whole prefix, so the longest prefix that each target holds is one walk over the prompt's hashes,
ANDing.  A target is a bit, its ``slot``.  One that leaves is masked at once; its bits are swept in slices and its slot
is given to another only afterwards.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, islice, repeat
from operator import and_, invert, or_, xor

from p2pdyn.wire.kvpack import DEVICE, HOST, TIERS

MAX_BLOCKS = 2**24
"""(hash, tier) entries of an index; at about 110 bytes each this is 2 GB."""

MAX_SLOTS = 4096
_SLICE = 4096
_FEW = 24
"""Blocks up to which one after the other is the faster way."""
_WALK = 64
"""Blocks that a match looks up before it asks whether anybody is left; doubles as long as somebody is."""
_MAX_SHARED = 65536


@dataclass(slots=True)
class Match:
    """For each slot that holds the first block: how many leading blocks it holds, in any tier. ``host`` and ``disk``
    say how many of these are in no faster tier; slots with none are left out."""

    blocks: dict[int, int] = field(default_factory=dict)
    host: dict[int, int] = field(default_factory=dict)
    disk: dict[int, int] = field(default_factory=dict)

    def device(self, slot: int) -> int:
        return self.blocks.get(slot, 0) - self.host.get(slot, 0) - self.disk.get(slot, 0)


class _Walk:
    """A sweep's way through ``tier``, of whose entries ``left`` are still to be seen; ``gone`` are keys to delete."""

    def __init__(self, tier: dict[int, int], gone: list[int]) -> None:
        self.tier = tier
        self.gone = gone
        self.left = len(tier)
        self.items = iter(tier.items())


class KvIndex:
    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.live = 0
        """Bit set of the slots in use."""
        self._max_blocks = max_blocks
        self._tiers: tuple[dict[int, int], ...] = tuple({} for _ in range(TIERS))
        self._bits: list[int] = []  # of each slot: its bit, 0 if nobody has it
        self._free: list[int] = []
        self._dead = 0
        self._sweeping = 0
        # A walk over a map is over with the first key that enters or leaves it.  So while a sweep walks a tier, what is
        # new enters another map, and what leaves is 0 and noted; after the walk both are made good.
        self._walks: list[_Walk] = []
        self._late: tuple[dict[int, int], ...] = tuple({} for _ in range(TIERS))
        self._gone: tuple[list[int], ...] = tuple([] for _ in range(TIERS))
        self._spare = 0  # entries that may certainly be added
        self._shared: dict[int, int] = {}  # one object for equal sets: 28 bytes and more, for which 8 then serve

    def __len__(self) -> int:
        """(hash, tier) entries, those still to be swept among them."""
        return self._max_blocks - self.room()

    def fits(self, count: int) -> bool:
        """Whether so many entries may still be added, mostly without a look at all maps."""
        if count > self._spare:
            self._spare = self.room()
        return count <= self._spare

    def room(self) -> int:
        """Entries that may still be added."""
        device, host, disk = self._tiers
        room = self._max_blocks - len(device) - len(host) - len(disk)
        return room - sum(map(len, self._late)) if self._sweeping else room

    # Targets

    def add(self) -> int:
        """A slot for a new target. With :data:`MAX_SLOTS` taken it first sweeps those that left; OverflowError."""
        if not self._free and len(self._bits) == MAX_SLOTS:
            while not self.sweep():
                pass
            if not self._free:
                raise OverflowError(f"more than {MAX_SLOTS} routing targets")
        if not self._free:
            self._free.append(len(self._bits))
            self._bits.append(0)
        slot = self._free.pop()
        self._bits[slot] = 1 << slot
        self.live |= 1 << slot
        return slot

    def drop(self, slot: int) -> None:
        """The target left: none of its blocks is found any more. Idempotent."""
        bit = self._bits[slot]
        self._bits[slot] = 0
        self.live &= ~bit
        self._dead |= bit

    def sweep(self, budget: int = _SLICE) -> bool:
        """Look at up to ``budget`` entries for targets that left. True when none is left to do."""
        if not self._sweeping:
            if not self._dead:
                return True
            self._sweeping = self._dead
            self._walks = [_Walk(*maps) for maps in zip(self._tiers, self._gone, strict=True)]
        while self._walks and budget > 0:
            walk = self._walks[-1]
            part = min(budget, walk.left)
            budget -= part
            self._clean(walk, part)
            if not walk.left:
                self._walks.pop()
        if self._walks or not self._settle(budget):
            return False
        self._free += _slots_of(self._sweeping)
        self._dead &= ~self._sweeping
        self._sweeping = 0
        self._shared.clear()
        return not self._dead

    def _clean(self, walk: _Walk, count: int) -> None:
        tier, mask = walk.tier, self._sweeping
        walk.left -= count
        for key, held in islice(walk.items, count):
            if held & mask:
                left = held & ~mask
                tier[key] = self._shared.setdefault(left, left)
                if not left:
                    walk.gone.append(key)

    def _settle(self, budget: int) -> bool:
        """The walks are over: make good what they put off. True when nothing is left to do."""
        for tier, gone, late in zip(self._tiers, self._gone, self._late, strict=True):
            while gone and budget > 0:
                key = gone.pop()
                budget -= 1
                if tier.get(key) == 0:
                    del tier[key]
            while late and budget > 0:
                key, held = late.popitem()
                budget -= 1
                tier[key] = held
        return not any(self._gone) and not any(self._late)

    # Blocks

    def store(self, slot: int, tier: int, hashes: Sequence[int]) -> list[int]:
        """``slot`` holds ``hashes`` in ``tier``. Those that it held before, and so says nothing new of: mostly none."""
        bit = self._bits[slot]
        self._spare -= len(hashes)
        if self._sweeping or not bit:
            return self._change_late(self._store, bit, tier, hashes)
        return self._store(self._tiers[tier], bit, hashes)

    def remove(self, slot: int, tier: int, hashes: Sequence[int]) -> list[int]:
        """``slot`` no longer holds ``hashes`` in ``tier``. Those that it did not hold before: mostly none."""
        bit = self._bits[slot]
        if self._sweeping or not bit:
            return self._change_late(self._remove, bit, tier, hashes)
        return self._remove(self._tiers[tier], bit, hashes)

    def swap(self, slot: int, gone: Sequence[int], come: Sequence[int]) -> tuple[int, list[int]] | None:
        """``slot`` no longer holds ``gone`` on the device, then holds ``come``: as :meth:`remove` and :meth:`store`, at
        less cost for a few blocks. By how many more it holds, and of which that said nothing new. None if there is no
        room for ``come``; then nothing is done."""
        if len(come) > self._spare and not self.fits(len(come)):
            return None
        bit, tier, change = self._bits[slot], self._tiers[DEVICE], len(come) - len(gone)
        if self._sweeping or not bit or len(gone) + len(come) > _FEW:
            left = self.remove(slot, DEVICE, gone) if gone else []
            held = self.store(slot, DEVICE, come) if come else []
            return change + len(left) - len(held), left + held
        self._spare -= len(come)
        same: list[int] = []
        for key in gone:
            before = tier.pop(key, 0)
            if before != bit:
                if after := before & ~bit:
                    tier[key] = self._share(after)
                if after == before:
                    same.append(key)
                    change += 1
        for key in come:
            before = tier.get(key, 0)
            if not before:
                tier[key] = bit
            elif before & bit:
                same.append(key)
                change -= 1
            else:
                tier[key] = self._share(before | bit)
        return change, same

    def held(self, slot: int) -> set[tuple[int, int]]:
        """Each (hash, tier) of a live target, by a walk over everything: for tests and reports."""
        bit = 1 << slot & self.live
        both = [(number, one) for tiers in (self._tiers, self._late) for number, one in enumerate(tiers)]
        return {(key, number) for number, tier in both for key, held in tier.items() if held & bit}

    def _change_late(self, change: Change, bit: int, number: int, keys: Sequence[int]) -> list[int]:
        """The same while a sweep walks ``tier``: no key enters it or leaves it. A target that left has no ``bit``."""
        if not bit:
            return list(keys)
        tier, late, gone = self._tiers[number], self._late[number], self._gone[number]
        here = [key for key in keys if key in tier]
        same = change(late, bit, [key for key in keys if key not in tier])
        if change == self._store:
            return same + change(tier, bit, here)
        left = {key: held for key in here if (held := tier[key])}
        known = set(left)
        same += change(left, bit, here)
        tier.update(left)
        for key in known - left.keys():
            tier[key] = 0
            gone.append(key)
        return same

    def _store(self, tier: dict[int, int], bit: int, keys: Sequence[int]) -> list[int]:
        """The keys that ``bit`` had before, in few passes over all of them: mostly all are new, or the first ones are
        held by the same others and the rest is new."""
        size, count = len(tier), len(keys)
        held = list(map(tier.setdefault, keys, repeat(bit)))
        known = count - len(tier) + size
        if not known:
            return []
        share, first = self._share, held[0]
        # None of the first ones had the bit, and as many keys entered as there are others: the others are those.
        if not first & bit and held[:known].count(first) == known:
            wider = dict.fromkeys(keys[:known], share(first | bit))
            if len(wider) == known:
                tier.update(wider)
                return []
        new = set(islice(reversed(tier), count - known))  # a dict keeps the order in which keys entered
        same = []
        before, after = 0, bit
        for key in keys:
            now = tier[key]
            if now & bit:
                if key in new:
                    new.discard(key)
                else:
                    same.append(key)
                continue
            if now != before:
                before, after = now, share(now | bit)
            tier[key] = after
        return same

    def _remove(self, tier: dict[int, int], bit: int, keys: Sequence[int]) -> list[int]:
        """The keys that ``bit`` did not have. Mostly it is the only holder of all: they leave, and others come back."""
        held = list(map(tier.pop, keys, repeat(0)))
        if held.count(bit) == len(keys):
            return []
        same = []
        for key, before in zip(keys, held, strict=True):
            after = before & ~bit
            if after:
                tier[key] = self._share(after)
            if after == before:
                same.append(key)
        return same

    def _share(self, held: int) -> int:
        """One object for equal sets."""
        if len(self._shared) > _MAX_SHARED:
            self._shared.clear()
        return self._shared.setdefault(held, held)

    # Prompts

    def match(self, hashes: list[int], candidates: int) -> Match:
        """How many leading blocks of a prompt (its sequence hashes) each target in the bit set ``candidates`` holds."""
        found = Match()
        blocks = found.blocks
        standing = candidates & self.live
        tiers = [tier for tier in (*self._tiers, *self._late) if tier]
        if hashes and not any(tier.get(hashes[0], 0) & standing for tier in tiers):
            return found  # the common case where prompts share nothing
        many = len(tiers) > 1 or not self._tiers[DEVICE]
        course: list[int] = []
        at, step = 0, _WALK
        while standing and tiers and at < len(hashes):
            part = hashes[at : at + step]
            held: Iterable[int] = map(tiers[0].get, part, repeat(0))
            for tier in tiers[1:]:
                held = map(or_, held, map(tier.get, part, repeat(0)))
            masks = list(accumulate(held, and_, initial=standing))
            last = masks[-1]
            if standing != last:  # sets only lose members, so as numbers they fall: the end of each is bisected
                rising = masks[::-1]
                count = less = len(rising)
                while standing != last:
                    less = bisect_left(rising, standing, 0, less)
                    now, depth = rising[less - 1], at + count - less - 1
                    lost = standing ^ now
                    while depth and lost:
                        low = lost & -lost
                        blocks[low.bit_length() - 1] = depth
                        lost ^= low
                    standing = now
            if many:
                course += masks[1:]
            at += len(part)
            step *= 2
        if tiers and at:
            blocks.update(dict.fromkeys(_slots_of(standing), at))
        if many:
            self._slower(hashes, course, found)
        return found

    def _holders(self, tier: int, keys: list[int]) -> Iterable[int]:
        held = map(self._tiers[tier].get, keys, repeat(0))
        late = self._late[tier]
        return map(or_, held, map(late.get, keys, repeat(0))) if late else held

    def _slower(self, hashes: list[int], course: list[int], found: Match) -> None:
        """Count the blocks that are in host or disk only. ``course`` says who still holds the prefix at each block."""
        known = hashes[: len(course)]
        slow = list(map(and_, course, map(invert, self._holders(DEVICE, known))))
        if not any(slow):
            return
        in_host = list(map(and_, slow, self._holders(HOST, known)))
        counts: tuple[list[int], list[int]] = [], []
        for planes, masks in zip(counts, (in_host, map(xor, slow, in_host)), strict=True):
            for mask, run in groupby(masks):
                _count(planes, mask, len(list(run)))
        for slot in found.blocks:
            for planes, into in zip(counts, (found.host, found.disk), strict=True):
                if many := sum((plane >> slot & 1) << power for power, plane in enumerate(planes)):
                    into[slot] = many


Change = Callable[[dict[int, int], int, Sequence[int]], list[int]]


def _count(planes: list[int], mask: int, times: int) -> None:
    """Add ``times`` to the counter of each slot in ``mask``: ``planes[i]`` holds bit i of every slot's counter."""
    first = 0
    while times and mask:
        carry, power = mask if times & 1 else 0, first
        while carry:
            if power >= len(planes):
                planes += [0] * (power + 1 - len(planes))
            planes[power], carry = planes[power] ^ carry, planes[power] & carry
            power += 1
        times >>= 1
        first += 1


def _slots_of(mask: int) -> list[int]:
    slots = []
    while mask:
        low = mask & -mask
        slots.append(low.bit_length() - 1)
        mask ^= low
    return slots
