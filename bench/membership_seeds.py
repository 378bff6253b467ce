"""Many runs of ``p2pdyn bench membership`` side by side: one JSON line for each (links, seed), then the worst of all.

    python bench/membership_seeds.py --nodes 1000 --links both --seeds 1,2,3,4 --jobs 16

Needs the standard library and this repository alone. A run of 1000 nodes for 600 s takes 5 to 10 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from p2pdyn.sim.bench_membership import run

WORST = (
    "missed",
    "detect_p99_s",
    "detect_max_s",
    "false_deaths",
    "false_suspicions",
    "bytes_per_s_mean",
    "bytes_per_s_max",
)


def case(settings: dict[str, Any]) -> dict[str, Any]:
    return run(**settings, progress=lambda text: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--loss", type=float, default=0.1)
    parser.add_argument("--links", choices=("tcp", "datagram", "both"), default="both")
    parser.add_argument("--seeds", default="1,2,3,4", help="separated by commas")
    parser.add_argument("--seconds", type=float, default=600.0, help="simulated")
    parser.add_argument("--crash-every", type=float, default=20.0, help="seconds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    links = ("tcp", "datagram") if options.links == "both" else (options.links,)
    settings = {"nodes": options.nodes, "loss": options.loss, "seconds": options.seconds}
    settings["crash_every_s"] = options.crash_every
    cases = [{**settings, "links": link, "seed": int(seed)} for seed in options.seeds.split(",") for link in links]
    worst: dict[str, dict[str, Any]] = {}
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(cases)), maxtasksperchild=1) as pool:
        for result in pool.imap_unordered(case, cases):
            del result["constants"]
            print(json.dumps(result), flush=True)
            so_far = worst.setdefault(result["links"], {})
            for key in WORST:
                so_far[key] = _worse(so_far.get(key, 0), result[key])
    for link, values in worst.items():
        print(json.dumps({"worst_of": link, **values}), flush=True)


def _worse(one: float | None, other: float | None) -> float | None:
    """None is a time that never came."""
    return None if one is None or other is None else max(one, other)


if __name__ == "__main__":
    main()
