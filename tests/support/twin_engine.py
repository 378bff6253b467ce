"""An engine of another name that computes as sim does: what two engines under one model name are when they agree."""

from __future__ import annotations

from dataclasses import replace

from p2pdyn.engines.base import EngineInfo, EngineOptions, Progress
from p2pdyn.engines.sim import SimEngine
from p2pdyn.engines.sim_args import SimArgs


class Twin(SimEngine):
    def load(self, progress: Progress) -> EngineInfo:
        return replace(super().load(progress), engine="twin", version="2.1")


def create(options: EngineOptions) -> Twin:
    return Twin(options, SimArgs.parse(options.args))
