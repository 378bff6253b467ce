"""Two engines of one model, few blocks, and a peer between them that does anything it may, in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support import moves
from support.engines import Mirror, Result, collect, sequence, text

from p2pdyn.engines.base import Held, Pin, Release, Reserved, Settle

MakeEngine = Callable[..., Any]
SIZE, BLOCKS, CONTEXT = 4, 16, 40
MAX_TOKENS = 6
PROMPTS = [
    [97 + (family * 5 + i * i) % 26 for i in range(length)] for family in range(3) for length in (3, 9, 17, 26, 33)
]


@dataclass
class Side:
    """One engine with what its peer knows."""

    engine: Any
    mirror: Mirror
    results: dict[int, Result]
    held: dict[int, Held]
    reserved: dict[int, Reserved]
    left: dict[int, Reserved]
    """Of a Settle that was not over."""


class Moves(RuleBasedStateMachine):
    make: MakeEngine

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[Side] = []
        self.prompt_of: dict[int, int] = {}
        self.aborted: set[int] = set()
        self.expected: dict[int, list[int]] = {}

    @initialize(seqs=st.sampled_from([1, 2, 6]))
    def begin(self, seqs: int) -> None:
        for _ in range(2):
            engine = self.make(block_size=SIZE, kv_blocks=BLOCKS, max_num_seqs=seqs, context=CONTEXT)
            self.sides.append(Side(engine, Mirror(SIZE), {}, {}, {}, {}))

    def alone(self, index: int) -> list[int]:
        """What one worker with enough blocks answers."""
        if index not in self.expected:
            self.expected[index] = text(self.roomy, PROMPTS[index], max_tokens=MAX_TOKENS)
        return self.expected[index]

    roomy: Any

    def key(self, index: int) -> int:
        key = len(self.prompt_of)
        self.prompt_of[key] = index
        return key

    # ---- what a peer does

    @rule(side=st.integers(0, 1), index=st.integers(0, len(PROMPTS) - 1), what=st.sampled_from(["run", "give", "pull"]))
    def submit(self, side: int, index: int, what: str) -> None:
        job = sequence(self.key(index), PROMPTS[index], max_tokens=MAX_TOKENS)
        pull = len(PROMPTS[index]) // SIZE if what == "pull" else 0
        self.sides[side].engine.submit(replace(job, hand_over=what == "give", pull=pull), 0.0)

    @rule(side=st.integers(0, 1), count=st.integers(1, 4))
    def step(self, side: int, count: int) -> None:
        at = self.sides[side]
        for _ in range(count):
            if at.engine.next_step(0.0) is None:
                break
            done = at.engine.step(0.0)
            collect(at.results, done)
            at.mirror.apply(done.kv)
            for note in done.transfers:
                if isinstance(note, Held):
                    assert note.key not in at.held
                    if note.blocks:
                        at.held[note.key] = note
                elif note.blocks:
                    at.reserved[note.key] = note

    @rule(side=st.integers(0, 1), data=st.data())
    def abort(self, side: int, data: st.DataObject) -> None:
        if self.prompt_of:
            key = data.draw(st.sampled_from(sorted(self.prompt_of)))
            self.sides[side].engine.abort(key, 0.0)
            self.aborted.add(key)

    @rule(side=st.integers(0, 1), index=st.integers(0, len(PROMPTS) - 1))
    def pin(self, side: int, index: int) -> None:
        here, there = self.sides[side], self.sides[1 - side]
        known = [*here.reserved.values(), *there.reserved.values(), *here.held.values(), *there.held.values()]
        if known:
            here.engine.transfer(Pin(self.key(index), known[index % len(known)].keys), 0.0)

    @rule(side=st.integers(0, 1), data=st.data())
    def fill(self, side: int, data: st.DataObject) -> None:
        """As many blocks as the other side holds of those that are asked for, or fewer."""
        here, there = self.sides[side], self.sides[1 - side]
        if not here.reserved:
            return
        wanted = here.reserved.pop(data.draw(st.sampled_from(sorted(here.reserved))))
        source = {key: block for held in there.held.values() for key, block in zip(held.keys, held.blocks, strict=True)}
        filled = 0
        while filled < len(wanted.keys) and wanted.keys[filled] in source:
            filled += 1
        filled = data.draw(st.integers(0, filled))
        theirs = [source[key] for key in wanted.keys[:filled]]
        size = moves.block_bytes(here.engine)
        moves.copy(moves.memory(there.engine), theirs, moves.memory(here.engine), wanted.blocks, size)
        here.engine.transfer(Settle(wanted.key, filled), 0.0)

    @rule(side=st.integers(0, 1), data=st.data())
    def give_up(self, side: int, data: st.DataObject) -> None:
        at = self.sides[side]
        if at.reserved:
            key = data.draw(st.sampled_from(sorted(at.reserved)))
            at.engine.transfer(Settle(key, 0, over=False), 0.0)
            at.left[key] = at.reserved.pop(key)

    @rule(side=st.integers(0, 1))
    def late_writes(self, side: int) -> None:
        """Whoever may write does, at the worst time."""
        at = self.sides[side]
        size, memory = moves.block_bytes(at.engine), moves.memory(at.engine)
        for note in (*at.left.values(), *at.reserved.values()):
            for block in note.blocks:
                memory[block * size : (block + 1) * size] = bytes([165]) * size

    @rule(side=st.integers(0, 1), data=st.data())
    def release(self, side: int, data: st.DataObject) -> None:
        at = self.sides[side]
        if keys := sorted({*at.held, *at.left}):
            key = data.draw(st.sampled_from(keys))
            at.held.pop(key, None)
            at.left.pop(key, None)
            at.engine.transfer(Release(key), 0.0)

    # ---- what must hold

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        for at in self.sides:
            at.engine.check()
            told = {note.key: list(note.blocks) for note in at.held.values()}
            assert {key: at.engine.lending.held[key] for key in told} == told
            tagged = {block for blocks in at.engine.lending.held.values() for block in blocks}
            for block in range(BLOCKS):
                assert (moves.tag(at.engine, block) != (bytes(8), 0, 0)) == (block in tagged)
            for note in at.held.values():
                for block, key, generation in zip(note.blocks, note.keys, note.generations, strict=True):
                    assert moves.tag(at.engine, block) == (key[:8], 0, generation)

    @invariant()
    def every_token_is_right(self) -> None:
        for at in self.sides:
            for key, result in at.results.items():
                whole = self.alone(self.prompt_of[key])
                assert result.tokens == whole[: len(result.tokens)]
                assert not result.finish or len(result.tokens) == len(whole)

    def teardown(self) -> None:
        """Give all back: then everything that was not aborted ends, and the blocks are free."""
        for side, at in enumerate(self.sides):
            for _ in range(400):
                for key in [*at.reserved]:
                    at.engine.transfer(Settle(key, 0), 0.0)
                    del at.reserved[key]
                for key in {*at.held, *at.left}:
                    at.engine.transfer(Release(key), 0.0)
                at.held.clear()
                at.left.clear()
                if at.engine.next_step(0.0) is None:
                    break
                self.step(side, 4)
            self.every_token_is_right()
            load = at.engine.load_report()
            assert (load.active_requests, load.active_blocks, load.queued, load.prefill_tokens_queued) == (0, 0, 0, 0)
            at.engine.cache.check([])
            assert set(at.mirror.blocks) == set(at.engine.cache.report())


@pytest.mark.timeout(120)
def test_whatever_a_peer_does_tokens_are_right_and_blocks_come_back(make_engine: MakeEngine) -> None:
    machine = type("Machine", (Moves,), {"make": staticmethod(make_engine), "roomy": make_engine()})
    run_state_machine_as_test(
        machine,
        settings=settings(
            deadline=None, max_examples=40, stateful_step_count=40, suppress_health_check=list(HealthCheck)
        ),
    )
