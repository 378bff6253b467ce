"""Throughput, time to first token and memory of p2pdyn and NVIDIA Dynamo in one run, alternating; one JSON line a load.

    python bench/throughput.py --dynamo-venv DIR        (bench/setup_dynamo.sh DIR makes it)
    python bench/throughput.py --only p2pdyn --profile  (py-spy on every process of the side under each load)

Both sides run on this machine at once, and one is loaded at a time. docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import client
import model_dir
import profiling
import sides
from sides import Side

Figures = dict[str, float]
LOWER_IS_BETTER = ("_ms", "_mb")


class Bench:
    """Both sides, the rounds over them, and the running number that keeps all prompts unique."""

    def __init__(self, running: list[Side], arguments: argparse.Namespace, scratch: Path) -> None:
        self.running = running
        self.arguments = arguments
        self.scratch = scratch
        self.number = 0

    def _next_number(self) -> int:
        self.number += 1_000_000
        return self.number % 80_000_000

    def check(self, load: client.Load) -> dict[str, dict[str, int]]:
        """Both sides stream one event a token and report the same usage, for the same prompt."""
        number = self._next_number()
        found = {side.name: client.check(url, load, number) for side in self.running for url in side.urls}
        usages = {name: {k: v for k, v in one.items() if k != "reply_bytes"} for name, one in found.items()}
        if len({json.dumps(usage, sort_keys=True) for usage in usages.values()}) > 1:
            raise client.CheckFailed(f"{load.name}: the sides report unlike usage: {usages}")
        return found

    def throughput(self, load: client.Load) -> dict[str, Any]:
        checked = self.check(load)
        number = self._next_number()

        def measure(side: Side, seconds: float) -> Figures:
            before = side.cpu_s()
            figures = client.wrk(side.urls, load, seconds, self.scratch, number)
            self._next_number()
            used = {part: now - before[part] for part, now in side.cpu_s().items()}
            spent = {f"{part}_cpu": round(cpu / seconds, 2) for part, cpu in used.items()}
            spent["cpu_ms"] = round(sum(used.values()) / seconds / max(figures["req_s"], 0.1) * 1e3, 3)
            expected = checked[side.name]["reply_bytes"]
            if figures["bad"] or figures["bytes_per_request"] < 0.8 * expected - 300:
                raise client.CheckFailed(f"{side.name}, {load.name}: {figures}, but one reply has {expected} bytes")
            return {**figures, **spent}

        return self._rounds(load.name, measure, ("req_s", "tok_s", "cpu_ms", "p50_ms", "p99_ms"))

    def ttft(self) -> dict[str, Any]:
        self.check(client.TTFT)
        requests = max(20, int(self.arguments.seconds * 50))

        def measure(side: Side, seconds: float) -> Figures:
            count = requests if seconds >= self.arguments.seconds else 20
            return client.ttft(side.urls[0], count, self._next_number())

        return self._rounds("ttft", measure, ("ttft_p50_ms", "ttft_p99_ms"))

    def memory(self, moment: str) -> dict[str, Any]:
        figures = {side.name: side.memory_mb() for side in self.running}
        return {"load": f"memory-{moment}", **figures, **_ratios(figures, ("rss_mb", "pss_mb"))}

    def _rounds(self, name: str, measure: Callable[[Side, float], Figures], keys: tuple[str, ...]) -> dict[str, Any]:
        """Warm up, then alternate; medians of each figure, and (max - min) / median of the first as its spread."""
        samples: dict[str, list[Figures]] = {side.name: [] for side in self.running}
        for side in self.running:
            measure(side, self.arguments.warmup)
        for i in range(self.arguments.rounds):
            for side in self.running if i % 2 == 0 else self.running[::-1]:
                samples[side.name].append(measure(side, self.arguments.seconds))
                side.check_alive()
        figures = {side: _summary(rows, keys[0]) for side, rows in samples.items()}
        return {"load": name, **figures, **_ratios(figures, keys)}


def _summary(rows: list[Figures], main: str) -> Figures:
    medians = {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
    values = [row[main] for row in rows]
    return {**medians, "spread": round((max(values) - min(values)) / medians[main], 3), "rounds": len(rows)}


def _ratios(figures: dict[str, Figures], keys: tuple[str, ...]) -> dict[str, Any]:
    """How many times better p2pdyn is in each figure: above 1 is faster, sooner or smaller."""
    if len(figures) < 2:
        return {}
    ours, theirs = figures["p2pdyn"], figures["dynamo"]
    better = {
        key: theirs[key] / ours[key] if key.endswith(LOWER_IS_BETTER) else ours[key] / theirs[key] for key in keys
    }
    return {"ratio": {key: round(value, 2) for key, value in better.items()}}


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "machine": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dynamo-venv", type=Path, default=os.environ.get("P2PDYN_DYNAMO_VENV"))
    parser.add_argument("--only", choices=["p2pdyn", "dynamo"], help="one side alone, without ratios")
    parser.add_argument("--load", action="append", choices=[*(load.name for load in client.LOADS), "ttft"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds on each side before each load")
    parser.add_argument("--frontends", type=int, default=1, help="p2pdyn's frontend processes")
    parser.add_argument("--dynamo-frontends", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--router", help="p2pdyn's routing policy; its default when absent")
    parser.add_argument("--quick", action="store_true", help="one short round: proves that it runs")
    parser.add_argument("--profile", action="store_true", help="py-spy on each process under each load, to stderr")
    parser.add_argument("--py-spy", default=shutil.which("py-spy"))
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.warmup = 1, 1.0, 1.0
    if arguments.only != "p2pdyn" and not arguments.dynamo_venv:
        parser.error("name Dynamo's environment with --dynamo-venv (bench/setup_dynamo.sh makes it), or --only p2pdyn")
    if arguments.profile and not arguments.py_spy:
        parser.error("--profile needs py-spy: pip install py-spy, or name it with --py-spy")
    return arguments


def start(arguments: argparse.Namespace, scratch: Path) -> list[Side]:
    model = model_dir.write(scratch / "model")
    running: list[Side] = []
    if arguments.only != "dynamo":
        running.append(
            sides.start_p2pdyn(
                scratch / "p2pdyn",
                model,
                frontends=arguments.frontends,
                workers=arguments.workers,
                router=arguments.router,
            )
        )
    if arguments.only != "p2pdyn":
        running.append(
            sides.start_dynamo(
                scratch / "dynamo",
                model,
                Path(arguments.dynamo_venv),
                frontends=arguments.dynamo_frontends,
                workers=arguments.workers,
            )
        )
    return running


def run(arguments: argparse.Namespace, running: list[Side], scratch: Path) -> None:
    bench = Bench(running, arguments, scratch)
    loads = [load for load in client.LOADS if not arguments.load or load.name in arguments.load]
    _print({"bench": "throughput", **machine(), "frontends": arguments.frontends, "workers": arguments.workers})
    _print(bench.memory("idle"))
    for load in loads:
        if arguments.profile:
            bench.check(load)
            for side in running:
                profiling.under_load(arguments.py_spy, side, load, arguments.seconds, scratch)
        _print(bench.throughput(load))
    if not arguments.load or "ttft" in arguments.load:
        _print(bench.ttft())
    _print(bench.memory("after"))


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> int:
    arguments = parse()
    with sides.scratch() as folder:
        running: list[Side] = []
        try:
            running = start(arguments, Path(folder))
            run(arguments, running, Path(folder))
        except client.CheckFailed as failure:
            print(f"bench: {failure}", file=sys.stderr)
            return 1
        finally:
            for side in running:
                side.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
