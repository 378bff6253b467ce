"""`sim`, with a request that kills it: asked for POISON_TOKENS tokens it dies, process and all, at the POISON_AT-th."""

from __future__ import annotations

import os
import signal

from p2pdyn.engines.base import EngineOptions, Sequence, Step
from p2pdyn.engines.sim import SimEngine
from p2pdyn.engines.sim_args import SimArgs

POISON_TOKENS, POISON_AT = 777, 3


def create(options: EngineOptions) -> OddEngine:
    return OddEngine(options, SimArgs.parse(options.args))


class OddEngine(SimEngine):
    def submit(self, sequence: Sequence, now: float) -> None:
        if sequence.params.max_tokens == POISON_TOKENS:
            self.poison = {sequence.key: 0}
        super().submit(sequence, now)

    def step(self, now: float) -> Step:
        step = super().step(now)
        poison: dict[int, int] = getattr(self, "poison", {})
        for output in step.outputs:
            if output.key in poison:
                poison[output.key] += len(output.tokens)
                if poison[output.key] >= POISON_AT:
                    os.kill(os.getpid(), signal.SIGKILL)
        return step
