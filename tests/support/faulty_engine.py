"""An engine that counts, and fails in the way that its first argument names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from p2pdyn.core.types import Load
from p2pdyn.engines.base import EngineError, EngineInfo, EngineOptions, Output, Progress, Sequence, Step


def create(options: EngineOptions) -> FaultyEngine:
    if options.args[:1] == ("bad-argument",):
        raise EngineError("argument bad-argument is bad: leave it out")
    return FaultyEngine(options.args[0] if options.args else "", options.data_dir)


class FaultyEngine:
    """Outputs 0, 1, 2 ... for each sequence."""

    def __init__(self, fault: str, folder: Path) -> None:
        self._fault = fault
        self._folder = folder
        self._done: dict[int, int] = {}
        self._end: dict[int, int] = {}

    def load(self, progress: Progress) -> EngineInfo:
        for part in range(4):
            progress(part / 4, f"part {part}")
        if self._fault == "load-error":
            raise EngineError("the weights are missing: name another --model")
        if self._fault == "load-bug":
            raise ZeroDivisionError("by nought")
        if self._fault == "load-long":
            (self._folder / "loading").touch()
            time.sleep(600)
        if self._fault == "grandchild":
            code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
            grandchild = subprocess.Popen([sys.executable, "-c", code])
            (self._folder / "grandchild").write_text(str(grandchild.pid))
        print("loaded", flush=True)
        return EngineInfo("faulty", "1", "count", b"card", 16, 100, 8, 4096, ("seed",))

    def submit(self, sequence: Sequence, now: float) -> None:
        self._done[sequence.key] = 0
        self._end[sequence.key] = sequence.params.max_tokens

    def abort(self, key: int, now: float) -> None:
        self._done.pop(key, None)

    def next_step(self, now: float) -> float | None:
        return now if self._done else None

    def step(self, now: float) -> Step:
        if self._fault == "step-bug":
            raise ZeroDivisionError("by nought")
        if self._fault == "step-error":
            raise EngineError("the device is gone: restart the host")
        if self._fault == "exit":
            os._exit(3)
        if self._fault == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (self._folder / "hanging").touch()
            time.sleep(600)
        if self._fault == "slow":
            time.sleep(0.002)
        step = Step()
        for key, done in list(self._done.items()):
            finish = "length" if done + 1 >= self._end[key] else ""
            step.outputs.append(Output(key, (done,), finish))
            self._done[key] += 1
            if finish:
                del self._done[key]
        return step

    def load_report(self) -> Load:
        return Load(active_requests=len(self._done), kv_total=100)

    def close(self) -> None:
        if self._fault == "close-told":
            (self._folder / "closed").touch()
