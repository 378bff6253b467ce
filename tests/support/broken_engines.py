"""The example engine with one fault each, and the subjects by which the conformance suite runs them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.conformance.subjects import NGRAM, ROOT, Subject
from ngram_engine import BLOCK, NgramEngine, create

from p2pdyn.engines.base import BlocksRemoved, EngineOptions, Output, Sequence, Step


class Forgetful(NgramEngine):
    """Tells of no block that it has evicted."""

    def step(self, now: float) -> Step:
        step = super().step(now)
        step.kv = [event for event in step.kv if not isinstance(event, BlocksRemoved)]
        return step


class Boastful(NgramEngine):
    """Counts a cached block too many."""

    def _keep(self, sequence: Sequence) -> int:
        return super()._keep(sequence) + BLOCK


class Stale(NgramEngine):
    """Another answer from a warm cache than from a cold one."""

    def _keep(self, sequence: Sequence) -> int:
        cached = super()._keep(sequence)
        if cached:
            sequence.tokens[-1] ^= 1
        return cached


class Deaf(NgramEngine):
    """Goes on with what was aborted."""

    def abort(self, key: int, now: float) -> None:
        pass


class Endless(NgramEngine):
    """Knows no stop token."""

    def _finish(self, sequence: Sequence, token: int) -> str:
        params = replace(sequence.params, stop_token_ids=(), ignore_eos=True)
        return super()._finish(replace(sequence, params=params), token)


class Hoarding(NgramEngine):
    """Tells all tokens at the end."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._made: dict[int, Output] = {}

    def step(self, now: float) -> Step:
        step = super().step(now)
        for output in step.outputs:
            made = self._made.setdefault(output.key, Output(output.key, ()))
            made.tokens += output.tokens
            made.cached += output.cached
            made.finish, made.detail = output.finish, output.detail
        step.outputs = [self._made.pop(output.key) for output in step.outputs if output.finish]
        return step


class Moody(NgramEngine):
    """Takes no notice of the seed."""

    def _choose(self, sequence: Sequence) -> int:
        params = replace(sequence.params, seed=random.getrandbits(32))
        return super()._choose(replace(sequence, params=params))


class Singular(NgramEngine):
    """Starts once in a folder only."""

    def load(self, *args: Any) -> Any:
        (self._options.data_dir / "started").mkdir()
        return super().load(*args)


def make(fault: type[NgramEngine]) -> Any:
    def factory(options: EngineOptions) -> NgramEngine:
        engine = create(options)
        return fault(options, engine._kv_blocks, engine._context)

    return factory


PATHS = ":".join(map(str, (ROOT / "examples" / "engine", Path(__file__).parents[1])))
FAULTS = (Forgetful, Boastful, Stale, Deaf, Endless, Hoarding, Moody, Singular)
for fault in FAULTS:
    name = fault.__name__.lower()
    globals()[f"make_{name}"] = make(fault)
    globals()[name] = replace(NGRAM, name=name, engine=f"support.broken_engines:make_{name}", patience_s=3.0)
    globals()[name] = replace(globals()[name], environment={"PYTHONPATH": PATHS})
assert isinstance(globals()["deaf"], Subject)
