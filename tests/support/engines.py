"""Driving an engine by hand, and checking its KV events against its cache."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Engine,
    KvEvent,
    Sequence,
    Step,
)


@dataclass
class Result:
    """What an engine has answered for one sequence."""

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    cached: int = 0
    logprobs: list[Any] = field(default_factory=list)
    detail: str = ""
    steps: int = 0


class Mirror:
    """The blocks that a reader of the events believes to be cached: hash to (parent, tokens, salt, lora)."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: dict[int, tuple[int | None, tuple[int, ...], str, str]] = {}

    def apply(self, events: Iterable[KvEvent]) -> None:
        for event in events:
            if isinstance(event, BlocksCleared):
                self.blocks.clear()
            elif isinstance(event, BlocksRemoved):
                for removed in event.hashes:
                    del self.blocks[removed]
            else:
                self._store(event)

    def _store(self, event: BlocksStored) -> None:
        size, parent = self.block_size, event.parent
        assert len(event.tokens) == size * len(event.hashes)
        assert parent is None or parent in self.blocks
        for index, stored in enumerate(event.hashes):
            assert stored not in self.blocks, "stored twice"
            tokens = event.tokens[index * size : (index + 1) * size]
            self.blocks[stored] = (parent, tokens, event.salt, event.lora)
            parent = stored

    def prefixes(self) -> set[tuple[str, str, tuple[int, ...]]]:
        """(salt, lora, all tokens up to the block's end) of every block; fails where a parent is missing."""
        found = set()
        for block in self.blocks:
            parts: list[tuple[int, ...]] = []
            at: int | None = block
            while at is not None:
                at, tokens, salt, lora = self.blocks[at]
                parts.append(tokens)
            found.add((salt, lora, tuple(token for part in reversed(parts) for token in part)))
        return found


def sequence(key: int, prompt: Iterable[int], output: Iterable[int] = (), **params: Any) -> Sequence:
    """A sequence with ``prompt`` and ``output`` that an earlier attempt produced; greedy unless told otherwise."""
    params.setdefault("temperature", 0.0)
    tokens = array("I", prompt)
    prompt_len = len(tokens)
    tokens.extend(output)
    return Sequence(key, tokens, prompt_len, SamplingParams(**params))


def collect(results: dict[int, Result], step: Step) -> None:
    """Add a step's outputs to ``results``; no sequence may have two, or one after its end."""
    keys = [output.key for output in step.outputs]
    assert len(keys) == len(set(keys)), "two outputs of one sequence in one step"
    for output in step.outputs:
        result = results.setdefault(output.key, Result())
        assert not result.finish, "output after the end"
        assert len(output.tokens) <= 1
        result.tokens += output.tokens
        result.finish = output.finish
        result.cached += output.cached
        result.logprobs += output.logprobs
        result.detail = output.detail
        result.steps += 1


def generate(engine: Engine, *sequences: Sequence, mirror: Mirror | None = None) -> dict[int, Result]:
    """Submit all at once and step until the engine is idle; time jumps to each due step."""
    results: dict[int, Result] = {}
    for item in sequences:
        engine.submit(item, 0.0)
    now = 0.0
    while (due := engine.next_step(now)) is not None:
        now = max(now, due)
        step = engine.step(now)
        collect(results, step)
        if mirror is not None:
            mirror.apply(step.kv)
    return results


def text(engine: Engine, prompt: Iterable[int], output: Iterable[int] = (), **params: Any) -> list[int]:
    """The tokens of one sequence, run alone; its key is 0."""
    return generate(engine, sequence(0, prompt, output, **params))[0].tokens
