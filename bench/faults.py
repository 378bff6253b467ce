"""A worker is hit while it has streams: what its clients notice. A JSON line a run, and one for each fault.

    python bench/faults.py [--fault kill,stop,drop,in,out,reset,flap] [--runs 20] [--frontends 1] [--mixed]

Hosts are network namespaces (root, iproute2, iptables), the cluster has a key.  A run: ``--streams`` clients ask for
``--tokens`` tokens at 10 ms each without a pause; the worker with the most streams is hit; after ``--hold`` seconds the
fault is over (a killed worker is started again); a second later the clients stop asking.  Then nothing may be open on
any worker within 5 s, and the worker must be in routing again.  ``silence`` is the longest time between two bytes of a
streamed answer that was open at or after the hit, ``moved_silence`` that of those that went elsewhere.  What is said
must be what an undisturbed cluster says.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from faults_load import Answer, Load, bodies, enter, loading
from netns.lab import Host, Lab, Node, missing
from support.nodes import make_key, wait_for

IDLE_S = 5.0
BACK_S = 15.0
SIM = ("--itl-ms", "10")
OPEN = re.compile(r"(?m)^p2pdyn_frontend_inflight_requests (?!0).*$")
BUSY = re.compile(r"(?m)^p2pdyn_worker_(?:active_requests|queued|active_blocks){.*} (?!0).*$")
TOLD = re.compile(r'(?m)^p2pdyn_worker_active_blocks{worker="(\w+)"')
UP = re.compile(r'worker_link_up{worker="(\w+)"} 1')


def reset(host: Host) -> None:
    """Every packet to it is answered with a reset."""
    host.run("iptables", "-I", "INPUT", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")


def flap(node: Node, hold: float) -> None:
    until = time.monotonic() + hold
    while time.monotonic() < until:
        node.host.link("down")
        time.sleep(0.7)
        node.host.link("up")
        time.sleep(0.7)


def chain(node: Node, *names: str) -> None:
    for name in names:
        node.host.run("iptables", "-I", name, "-p", "tcp", "-j", "DROP")


FAULTS: dict[str, tuple[Callable[[Node, float], None], Callable[[Node], None]]] = {
    "kill": (lambda node, hold: node.kill(), lambda node: None),
    "stop": (lambda node, hold: node.signal(signal.SIGSTOP), lambda node: node.signal(signal.SIGCONT)),
    "drop": (lambda node, hold: chain(node, "INPUT", "OUTPUT"), lambda node: node.host.heal()),
    "in": (lambda node, hold: chain(node, "INPUT"), lambda node: node.host.heal()),
    "out": (lambda node, hold: chain(node, "OUTPUT"), lambda node: node.host.heal()),
    "reset": (lambda node, hold: reset(node.host), lambda node: node.host.heal()),
    "flap": (flap, lambda node: None),
    "none": (lambda node, hold: None, lambda node: None),
}
"""Name -> (begin, end). One-way loss is named by the direction in which the worker's packets get lost.
"none" is the control: what the machine itself does to the streams."""


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


class Bench:
    """A cluster, and the faults done to it."""

    def __init__(self, lab: Lab, options: argparse.Namespace) -> None:
        self.options = options
        self.lab = lab
        switch = lab.switch("10.30.1")
        key = make_key(lab.folder)
        self.hosts = {}
        for number in range(1, options.frontends + options.workers + 1):
            name = f"f{number}" if number <= options.frontends else f"w{number - options.frontends}"
            host = self.hosts[name] = lab.host(name, switch, number)
            host.key = key
        self.frontends = [self.node(h, "--engine", "none", "--http", f"{h.address}:8000") for h in self._hosts("f")]
        self.workers = [self.start_worker(host) for host in self._hosts("w")]
        for node in (*self.frontends, *self.workers):
            node.wait_ready()
        self.space = self.hosts["f1"].space
        self.inside = ThreadPoolExecutor(1, initializer=enter, initargs=(self.space,))
        self.bodies = bodies(options.streams, options.tokens, options.mixed)
        wait_for(lambda: self.in_routing() == {w.id for w in self.workers}, 20, "all workers in routing")
        self.said = [answer.sayings for answer in self.load().once()]
        assert all(self.said)

    def _hosts(self, letter: str) -> list[Host]:
        return [host for name, host in self.hosts.items() if name.startswith(letter)]

    def node(self, host: Host, *args: str) -> Node:
        first = self.hosts["f1"].address
        assert host.key is not None
        return host.node("--listen", host.address, "--cluster-key", str(host.key), "--seed", f"{first}:7400", *args)

    def start_worker(self, host: Host) -> Node:
        model = ("--model", self.options.model, "--served-model-name", "sim") if self.options.model else ()
        return self.node(host, "--engine", self.options.engine, *model, "--no-http", "--", *self.options.engine_args)

    def load(self) -> Load:
        return Load([f"http://{host.address}:8000" for host in self._hosts("f")], self.bodies, self.space)

    def metrics(self, host: Host) -> str:
        return self.inside.submit(fetch, f"http://{host.address}:8000/metrics").result()

    def in_routing(self) -> set[str]:
        """The workers that every frontend would send a request to."""
        found = [set(UP.findall(self.metrics(h))) for h in self._hosts("f")]
        return set.intersection(*found)

    def busy(self) -> list[str]:
        """What is open: on workers as they last told the first frontend, on frontends."""
        told = self.metrics(self._hosts("f")[0])
        idle = {worker.id for worker in self.workers} <= set(TOLD.findall(told))
        lines = [line for host in self._hosts("f") for line in OPEN.findall(self.metrics(host))]
        return [*lines, *BUSY.findall(told), *([] if idle else ["a worker has not told its load"])]

    def run(self, fault: str) -> dict[str, Any]:
        options, load = self.options, self.load()
        begin, end = FAULTS[fault]
        with loading(load):
            wait_for(lambda: len(load.answers) >= options.streams // 2, 30, "the clients' first answers")
            wait_for(lambda: len(load.open) == options.streams, 10, "all streams open")
            time.sleep(0.3)
            victim = self.victim(load)
            hit = time.monotonic()
            begin(victim, options.hold)
            time.sleep(max(0.0, hit + options.hold - time.monotonic()))
            end(victim)
            if fault == "kill":
                self.workers[self.workers.index(victim)] = victim = self.start_worker(victim.host)
            over = time.monotonic()
            time.sleep(1.0)
        victim.wait_ready()
        halted = time.monotonic()
        idle_s = self.timed(lambda: not self.busy(), halted, IDLE_S + 3)
        back_s = self.timed(lambda: victim.id in self.in_routing(), over, BACK_S)
        return self.judged(fault, load.answers, hit, victim.id, idle_s, back_s)

    def victim(self, load: Load) -> Node:
        counts = Counter(answer.first_worker for answer in list(load.open.values()) if answer.first_worker)
        chosen = counts.most_common(1)[0][0] if counts else self.workers[0].id
        return next(worker for worker in self.workers if worker.id == chosen)

    @staticmethod
    def timed(condition: Callable[[], object], since: float, within: float) -> float | None:
        try:
            wait_for(condition, within, "", every=0.05)
        except AssertionError:
            return None
        return round(time.monotonic() - since, 3)

    def judged(
        self, fault: str, answers: list[Answer], hit: float, victim: str, idle_s: float | None, back_s: float | None
    ) -> dict[str, Any]:
        met = [answer for answer in answers if answer.ended >= hit]
        streamed = [answer for answer in met if answer.streamed and not answer.error]
        silent = max(streamed, key=lambda answer: answer.silence, default=None)
        moved = [answer for answer in met if answer.migrations and not answer.error]
        return {
            "bench": "faults",
            "fault": fault,
            "requests": len(met),
            "failed": sum(bool(answer.error) for answer in met),
            "wrong": sum(not a.error and a.sayings != self.said[a.slot] for a in met),
            "moved": len(moved),
            "migrations_max": max((answer.migrations for answer in met), default=0),
            "silence_s": round(silent.silence, 3) if silent else None,
            "moved_silence_s": round(max((a.silence for a in moved if a.streamed), default=0.0), 3),
            "silence_began_s": round(silent.silent_at - hit, 3) if silent else None,
            "slowest_s": round(max(answer.ended - answer.began for answer in met), 3),
            "idle_s": idle_s,
            "back_s": back_s,
            "errors": sorted({answer.error for answer in met if answer.error})[:3],
        }


def summary(fault: str, runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    silences = [run["silence_s"] for run in runs if run["silence_s"] is not None]
    moved = [run["moved_silence_s"] for run in runs]
    sums = {name: sum(run[name] for run in runs) for name in ("requests", "failed", "wrong", "moved")}
    return {
        "bench": "faults-summary",
        "fault": fault,
        "runs": len(runs),
        "frontends": options.frontends,
        "workers": options.workers,
        "streams": options.streams,
        "mixed": options.mixed,
        "engine": options.engine,
        **sums,
        "migrations_max": max(run["migrations_max"] for run in runs),
        "silence_p50_s": statistics.median(silences),
        "moved_silence_p50_s": statistics.median(moved),
        "moved_silence_max_s": max(moved),
        "silence_p99_s": max(silences) if len(silences) < 100 else statistics.quantiles(silences, n=100)[98],
        "idle_max_s": None if any(r["idle_s"] is None for r in runs) else max(r["idle_s"] for r in runs),
        "back_max_s": None if any(r["back_s"] is None for r in runs) else max(r["back_s"] for r in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fault", default="kill,stop,drop", help=f"of {','.join(FAULTS)}")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--hold", type=float, default=4.0, help="seconds that the fault lasts")
    parser.add_argument("--mixed", action="store_true", help="n=2, seeds, stop strings and whole answers too")
    parser.add_argument("--engine", default="sim")
    parser.add_argument("--model", default="")
    parser.add_argument("--engine-args", nargs=argparse.REMAINDER, default=list(SIM))
    options = parser.parse_args()
    if why := missing():
        raise SystemExit(why)
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab:
        bench = Bench(lab, options)
        for fault in options.fault.split(","):
            runs = []
            for _ in range(options.runs):
                runs.append(bench.run(fault))
                print(json.dumps(runs[-1]), flush=True)
            print(json.dumps(summary(fault, runs, options)), flush=True)


if __name__ == "__main__":
    main()
