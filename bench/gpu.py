"""p2pdyn with vLLM or SGLang on GPUs, beside the engine's own server in the same run; one JSON line a stage.

    python bench/gpu.py --engine sglang --out FILE.jsonl                       every stage, on one GPU
    python bench/gpu.py --engine vllm --only pd,pd-ttft --gpus 2 --out F.jsonl decode on a GPU of its own
    python bench/gpu.py --engine vllm --cpu --out FILE.jsonl                   small: proves that it runs

Needs the engine (and NIXL for prefill and decode, pytest and pytest-timeout for the suite); no network, no model: it
makes folders of real size with random weights. docs/gpu.md says how to bring all that to a host without network.

conformance  tests/engines/conformance, the suite that every engine passes.
overhead     p2pdyn's endpoint and worker beside the engine's own server, both up on one GPU, one loaded at a time,
             alternating: throughput at fixed concurrency, time to first token at 60 % of capacity, with 95 %
             intervals; `sampled`: at temperature 0.8.
routing      two workers: second turns go where the first were computed, and the engine says that it was cached.
pd           prefill and decode workers, KV over NIXL: greedy tokens against one aggregated worker's.
pd-ttft      the same: time to first token, and what the router would decide.

A stage that fails says why in its line, and the next one is run all the same; rc is 1 then. FILE.log has the ends of
all servers' logs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_client import Load
from gpu_conformance import conformance
from gpu_engines import BYTES, ENGINES, Engine
from gpu_model import SHAPES
from gpu_side import BenchError, Servers, say
from gpu_stages import MEASURED, Plan

STAGES = {"conformance": conformance, **MEASURED}
LIMITS_S = {"conformance": 560.0, "overhead": 560.0, "routing": 300.0, "pd": 360.0, "pd-ttft": 360.0}
LOG_TAIL = 40_000
PACKAGES = ("torch", "nixl", "transformers", "pyzmq")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(ENGINES), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON lines are added here; FILE.log has the logs' ends"
    )
    parser.add_argument("--only", metavar="STAGE,...", help=f"of {', '.join(STAGES)}, in the order given [all]")
    parser.add_argument("--gpus", type=int, default=1, help="2: the decode worker has one of its own [1]")
    parser.add_argument("--cpu", action="store_true", help="the engine on a CPU, the tiny shape, float32")
    limits = ", ".join(f"{name} {limit:.0f}" for name, limit in LIMITS_S.items())
    parser.add_argument("--limit", type=float, help=f"seconds for each stage [{limits}]")
    parser.add_argument("--start-limit", type=float, help="seconds until a stage's servers must be up [180]")
    parser.add_argument("--serial", action="store_true", help="start servers one after the other")
    parser.add_argument("--scratch", type=Path, help="where models and logs are kept; a temporary folder otherwise")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--shape", choices=list(SHAPES), help="of the model whose speed is measured [llama-8b]")
    parser.add_argument("--pairs", type=int, help="overhead: pairs of measurements [10]")
    parser.add_argument(
        "--requests", type=int, help="overhead: of one of throughput [96]; half as many for one of TTFT"
    )
    parser.add_argument("--streams", type=int, help="overhead: clients at once [32]")
    parser.add_argument("--repeats", type=int, help="pd-ttft: prompts of each size [6]")
    parser.add_argument(
        "--exact-shape", choices=list(SHAPES), help="routing, pd: of the model whose tokens are compared [llama-1b]"
    )
    parser.add_argument("--exact-dtype", choices=list(BYTES), help="pd: vLLM [float32], SGLang [float16]")
    parser.add_argument("--subject", help="conformance: what pytest's --engine is given [the engine on a GPU]")
    return parser.parse_args(argv)


def plan(given: argparse.Namespace, engine: Engine, folder: Path) -> Plan:
    cpu = given.cpu
    streams = given.streams or (4 if cpu else 32)
    return Plan(
        folder=folder,
        engine=engine,
        shape=given.shape or ("tiny" if cpu else "llama-8b"),
        exact_shape=given.exact_shape or ("tiny" if cpu else "llama-1b"),
        exact_dtype=given.exact_dtype or engine.exact_dtype,
        cpu=cpu,
        gpus=1 if cpu else given.gpus,
        pairs=given.pairs or (2 if cpu else 10),
        requests=given.requests or (12 if cpu else 96),
        load=Load(128, 32, streams) if cpu else Load(512, 128, streams),
        exact_prompts=tuple(range(200, 2001, 900 if cpu else 200)),
        ttft_prompts=(256, 1024) if cpu else (512, 4096, 12000),
        repeats=given.repeats or (2 if cpu else 6),
        start_s=given.start_limit or (280.0 if cpu else 180.0),
        eager=given.eager,
        subject=given.subject or engine.subject,
        limit_s=0.0,
    )


def run(name: str, made: Plan, given: argparse.Namespace) -> dict[str, Any]:
    """One stage, never longer than its limit; what went wrong is in its line."""
    began = time.monotonic()
    limit_s = given.limit or LIMITS_S[name] * (2 if made.cpu else 1)
    logs = made.folder / f"logs-{made.engine.name}-{name}-{int(began)}"
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    line: dict[str, Any] = {"stage": name, "engine": made.engine.name}
    try:
        with Servers(logs, made.engine.env, made.start_s if given.serial else 0.0) as servers:
            try:
                line |= STAGES[name](replace(made, limit_s=limit_s), servers)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except BenchError as error:
        line["error"] = str(error)
    except Exception as error:  # the other stages are run all the same
        line["error"] = f"{type(error).__name__}: {error}"
    line["seconds"] = round(time.monotonic() - began, 1)
    with given.out.with_suffix(".log").open("a") as kept:
        for log in sorted(logs.glob("*.log")):
            kept.write(f"===== {name} {log.name}\n{log.read_text(errors='replace')[-LOG_TAIL:]}\n")
    return line


def _late(number: int, frame: FrameType | None) -> None:
    raise BenchError("the stage took longer than its limit")


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # servers are stopped on the way out


def machine(given: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    gpus: list[str] = []
    if not given.cpu and shutil.which("nvidia-smi"):
        ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=False).stdout.strip().splitlines()
    versions = {}
    for package in (*engine.packages, *PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"bench": "gpu", "argv": sys.argv[1:], "python": platform.python_version(), "gpus": gpus, **versions}


def main() -> int:
    given = parse()
    engine = ENGINES[given.engine](given.cpu)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    names = given.only.split(",") if given.only else list(STAGES)
    if unknown := set(names) - set(STAGES):
        raise SystemExit(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    signal.signal(signal.SIGTERM, _end)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="p2pdyn-bench-", ignore_cleanup_errors=True) as temporary:
        made = plan(given, engine, given.scratch or Path(temporary))
        _print(given.out, machine(given, engine))
        for name in names:
            say(f"stage {name}")
            line = run(name, made, given)
            failed += "error" in line
            _print(given.out, line)
    return 1 if failed else 0


def _print(out: Path, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    with out.open("a") as kept:
        kept.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
