"""Peers under full CPU load: false suspicions and deaths, loop lag, descriptors. One JSON line.

    python bench/liveness.py [--peers 10] [--seconds 60] [--burners 2 a core]

Real `p2pdyn node` processes on loopback, CURVE on. Every peer logs each change of state that it sees of another, so the
logs of all peers are all (observer, subject) pairs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
from support.nodes import Cluster, NodeProcess, wait_for

from p2pdyn.net.curve import write_key_file

CHANGE = re.compile(r"peer \S+ \(\w+\) at \S+: (\S+) -> (\S+)")


def burn(until: float) -> None:
    while time.monotonic() < until:
        sum(range(10_000))


def loop_lag_ms(node: NodeProcess) -> float:
    with urllib.request.urlopen(f"{node.url}/metrics", timeout=30) as answer:
        found = re.search(r"^p2pdyn_loop_lag_seconds (\S+)", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1]) * 1000


def run(peers: int, seconds: float, burners: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "key"
        write_key_file(key)
        with Cluster(Path(folder), key) as cluster:
            first = cluster.frontend("p0")
            for number in range(1, peers):
                cluster.worker(f"p{number}", seeds=[first])
            everybody = lambda: len(first.peers(cluster.key)["peers"]) == peers  # noqa: E731
            wait_for(everybody, 30, "all peers joined", every=0.5)
            settled = [len(node.errors) for node in cluster.nodes]
            descriptors = [psutil.Process(node.process.pid).num_fds() for node in cluster.nodes]
            until = time.monotonic() + seconds
            load = [multiprocessing.Process(target=burn, args=(until,)) for _ in range(burners)]
            for process in load:
                process.start()
            busy = []
            psutil.cpu_percent()
            while time.monotonic() < until:
                time.sleep(min(5.0, max(0.1, until - time.monotonic())))
                busy.append(psutil.cpu_percent())
                print(f"{max(0.0, until - time.monotonic()):.0f} s left, cpu {busy[-1]} %", file=sys.stderr)
            for process in load:
                process.join()
            time.sleep(6.0)  # a death that was under way would be told by now
            changes = [
                match.groups()
                for node, start in zip(cluster.nodes, settled, strict=True)
                for line in node.errors[start:]
                if (match := CHANGE.search(line))
            ]
            return {
                "bench": "liveness",
                "peers": peers,
                "seconds": seconds,
                "cores": os.cpu_count(),
                "burners": burners,
                "cpu_percent_mean": round(sum(busy) / len(busy), 1),
                "false_suspicions": sum(1 for _, to in changes if to == "suspect"),
                "false_deaths": sum(1 for _, to in changes if to in ("dead", "left")),
                "frontend_loop_lag_ms_max": round(loop_lag_ms(first), 1),
                "descriptors_frontend": descriptors[0],
                "descriptors_worker_max": max(descriptors[1:]),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--peers", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--burners", type=int, default=2 * (os.cpu_count() or 1))
    options = parser.parse_args()
    print(json.dumps(run(options.peers, options.seconds, options.burners)))


if __name__ == "__main__":
    main()
