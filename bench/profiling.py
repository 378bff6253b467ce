"""Sampling profiles of a side's processes under load, by py-spy: functions by self and inclusive time.

Only threads that hold the interpreter lock are counted: on a busy machine a send that wakes another thread and is
switched away from would else look like the cost of the send.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import client
from sides import Side

TOP = 30
RATE_HZ = 200


def under_load(py_spy: str, side: Side, load: client.Load, seconds: float, scratch: Path) -> None:
    """Load the side for `seconds`, with py-spy on each of its processes; tables go to stderr."""
    recorders = []
    for i, process in enumerate(side.processes):
        kind = "frontend" if process in side.frontends else "worker"
        file = scratch / f"{side.name}-{load.name}-{kind}{i}.raw"
        command = [
            py_spy,
            "record",
            "--pid",
            str(process.pid),
            "--duration",
            str(round(seconds)),
            "--rate",
            str(RATE_HZ),
        ]
        recorders.append(
            (
                kind,
                file,
                subprocess.Popen(
                    [*command, "--format", "raw", "--output", str(file), "--nonblocking", "--gil"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                ),
            )
        )
    client.wrk(side.urls, load, seconds + 1, scratch, 80_000_000)
    for kind, file, recorder in recorders:
        recorder.wait(30)
        if file.exists():
            print(f"\n== {side.name} {kind}, {load.name}", *table(file.read_text()), sep="\n", file=sys.stderr)


def table(raw: str) -> list[str]:
    """Lines `self% inclusive% function` of folded stacks, by self time; a function counts once a stack."""
    own: Counter[str] = Counter()
    inclusive: Counter[str] = Counter()
    total = 0
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [_short(frame) for frame in stack.split(";")]
        total += int(count)
        own[frames[-1]] += int(count)
        for frame in set(frames):
            inclusive[frame] += int(count)
    lines = ["  self  incl  function"]
    shown = {name for name, _ in own.most_common(TOP)} | {name for name, _ in inclusive.most_common(TOP)}
    ranked = sorted(shown, key=lambda name: (-own[name], -inclusive[name]))
    lines += [f"{100 * own[name] / total:6.1f}{100 * inclusive[name] / total:6.1f}  {name}" for name in ranked]
    return lines


def _short(frame: str) -> str:
    """`function (module.py)` without the line number, so that lines of one function add up."""
    name, _, place = frame.partition(" (")
    return f"{name} ({place.rsplit(':', 1)[0].rstrip(')')})" if place else frame
