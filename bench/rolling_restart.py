"""Every worker and every frontend is drained and started again under load: what a retrying client notices.

    python bench/rolling_restart.py [--workers 3] [--frontends 2] [--streams 16] [--tokens 300] [--finish 20]

Prints one JSON line.  ``--streams`` clients ask without a pause for ``--tokens`` tokens at 10 ms each, some streamed,
some whole, sampled and greedy; what one frontend does not take goes to the next.  Workers go by `p2pdyn drain`,
frontends by SIGTERM, one after the other, each started again and seen ready before the next one goes.  ``--finish`` is
how long a drain lets streams run before they move (FINISH_S).  ``silence_ms`` is the longest time between two bytes of
a streamed answer; ``wrong`` counts answers, usage included, that differ from those of the undisturbed cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from faults_load import Answer, ask, bodies
from support import brief_drain
from support.nodes import Cluster, NodeProcess, make_key, wait_for

from p2pdyn.core.drain import FINISH_S, LIMIT_S

UP = re.compile(r'worker_link_up{worker="(\w+)"} 1')
SIM = ("--", "--itl-ms", "10")
NOT_TAKEN = ('"code":"draining"', "ConnectionRefusedError", "ConnectionResetError", "no answer")


class Clients(threading.Thread):
    """Each asks for its body again and again, of one frontend after the other, until :attr:`over`."""

    def __init__(self, urls: Sequence[str], asked: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.urls, self.asked = urls, asked
        self.answers: list[Answer] = []
        self.retries = 0
        self.over = threading.Event()

    def run(self) -> None:
        async def main() -> None:
            await asyncio.gather(*(self._client(slot) for slot in range(len(self.asked))))

        asyncio.run(main())

    async def _client(self, slot: int) -> None:
        turn = slot
        while not self.over.is_set():
            answer = await ask(self.urls[turn % len(self.urls)], self.asked[slot], slot, {})
            turn += 1
            if any(sign in answer.error for sign in NOT_TAKEN) and not answer.first_worker:
                self.retries += 1
                await asyncio.sleep(0.1)
            else:
                self.answers.append(answer)


class Rollout:
    def __init__(self, cluster: Cluster, options: argparse.Namespace) -> None:
        self.cluster = cluster
        self.program = (sys.executable, brief_drain.__file__, str(options.finish), str(LIMIT_S))
        self.frontends: list[NodeProcess] = []
        self.workers: list[NodeProcess] = []
        for i in range(options.frontends):
            self.frontends.append(self.start(f"f{i}", self.frontends))
        for i in range(options.workers):
            self.workers.append(self.start(f"w{i}", self.frontends))
        self.settle()

    def start(self, name: str, seeds: Sequence[NodeProcess], http: str = "127.0.0.1:0") -> NodeProcess:
        engine, args = ("sim", ("--no-http", *SIM)) if name[0] == "w" else ("none", ("--http", http))
        return self.cluster.start(name, *args, engine=engine, seeds=seeds, program=self.program).wait_ready()

    def settle(self) -> None:
        """Every frontend has every worker's link up."""
        for frontend in self.frontends:
            wait_for(lambda f=frontend: links_up(f) == len(self.workers), 30, "all links up")

    def restart_worker(self, i: int) -> float:
        """Seconds until it had left."""
        node, began = self.workers[i], time.monotonic()
        command = [sys.executable, "-m", "p2pdyn", "drain", node.id, "--at", self.frontends[0].mesh]
        subprocess.run([*command, *self.cluster.key_args()], check=True, timeout=120, capture_output=True)
        assert node.process.wait(10) == 0
        took = time.monotonic() - began
        self.workers[i] = self.start(f"w{i}", self.frontends)
        self.settle()
        return took

    def restart_frontend(self, i: int) -> float:
        node, began = self.frontends[i], time.monotonic()
        node.signal(signal.SIGTERM)
        assert node.process.wait(120) == 0
        took = time.monotonic() - began
        self.frontends[i] = self.start(f"f{i}", self.workers, node.url.removeprefix("http://"))
        self.settle()
        return took


def links_up(frontend: NodeProcess) -> int:
    with urllib.request.urlopen(f"{frontend.url}/metrics", timeout=10) as answer:
        return len(set(UP.findall(answer.read().decode())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("workers", 3), ("frontends", 2), ("streams", 16), ("tokens", 300)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--finish", type=float, default=FINISH_S)
    options = parser.parse_args()
    asked = bodies(options.streams, options.tokens, mixed=True)
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), make_key(Path(folder))) as cluster:
        rollout = Rollout(cluster, options)
        urls = [frontend.url for frontend in rollout.frontends]
        undisturbed = [asyncio.run(ask(urls[0], body, slot, {})).sayings for slot, body in enumerate(asked)]
        clients = Clients(urls, asked)
        clients.start()
        try:
            workers = [rollout.restart_worker(i) for i in range(options.workers)]
            frontends = [rollout.restart_frontend(i) for i in range(options.frontends)]
        finally:
            clients.over.set()
            clients.join()
    answers = clients.answers
    failed = [answer.error for answer in answers if answer.error]
    found = {
        "bench": "rolling_restart",
        **vars(options),
        "requests": len(answers),
        "failed": len(failed),
        "wrong": sum(not a.error and a.sayings != undisturbed[a.slot] for a in answers),
        "retries": clients.retries,
        "moved": sum(a.migrations > 0 for a in answers),
        "silence_ms": round(1000 * max(a.silence for a in answers if a.streamed)),
        "drain_s": {"workers": [round(s, 1) for s in workers], "frontends": [round(s, 1) for s in frontends]},
    }
    print(json.dumps(found))
    for error in failed[:5]:
        print(error, file=sys.stderr)
    return bool(found["failed"] or found["wrong"])


if __name__ == "__main__":
    sys.exit(main())
