"""Real processes that route by what workers hold: hits, explanations, lost events, frontends that come late."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import string
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import lossy_node
from support.nodes import Cluster, NodeProcess, make_key, wait_for

from p2pdyn.core.types import Address
from p2pdyn.net.admin import admin_call
from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets

LOST, LOSS_S, REPAIRED_S = 0.2, 30.0, 5.0
LATE_S = 2.0
"""A frontend that starts under load knows all caches after this long."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, make_key(tmp_path)) as nodes:
        yield nodes


def text(tokens: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=tokens))


def complete(node: NodeProcess, prompt: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """The worker that answered, and the answer."""
    body = json.dumps({"model": "sim", "prompt": prompt, "max_tokens": 4, "temperature": 0, **more}).encode()
    request = urllib.request.Request(f"{node.url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.headers["x-p2pdyn-worker"], json.load(answer)


def explain(cluster: Cluster, node: NodeProcess, prompt: str, *more: str) -> dict[str, Any]:
    command = ["explain", prompt, "--json", "--at", node.mesh, *cluster.key_args(), *more]
    done = subprocess.run(
        [sys.executable, "-m", "p2pdyn", *command], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def streams(cluster: Cluster, node: NodeProcess) -> dict[str, dict[str, Any]]:
    """By worker id, as ``node`` sees them."""
    peers = node.peers(cluster.key)["peers"]
    return {peer["id"]: peer["kv"] for peer in peers if peer["role"] != "frontend"}


def all_exact(cluster: Cluster, node: NodeProcess, workers: int) -> bool:
    found = streams(cluster, node)
    return len(found) == workers and all(stream["stream"] == "EXACT" for stream in found.values())


def blocks(cluster: Cluster, asked: NodeProcess, worker: NodeProcess) -> dict[str, Any]:
    """What ``worker`` holds, as ``asked`` knows it."""
    assert cluster.key is not None
    security = Security.load(cluster.key)

    async def call() -> dict[str, Any]:
        sockets = Sockets(security)
        try:
            return await admin_call(sockets, Address.parse(asked.mesh), "kv", {"worker": worker.id}, 5)
        finally:
            sockets.close()

    return asyncio.run(call())


class Traffic:
    """Completions over and over on some frontends, prompts that share prefixes; ``failed`` are what did not answer."""

    def __init__(self, *frontends: NodeProcess) -> None:
        self.failed: list[str] = []
        self.answered = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(node, i)) for i, node in enumerate(frontends)]

    def _run(self, node: NodeProcess, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            prompt = text(400, rng.randrange(40)) + text(200, rng.randrange(10_000))
            try:
                complete(node, prompt)
                self.answered += 1
            except OSError as error:
                self.failed.append(str(error))

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def test_a_prompt_goes_where_its_prefix_is_and_explain_knows(cluster: Cluster) -> None:
    frontend = cluster.frontend("f")
    workers = {w.id for w in (cluster.worker(f"w{i}", seeds=[frontend]) for i in range(3))}
    wait_for(lambda: all_exact(cluster, frontend, 3), 10, "all streams exact")
    for seed in range(6):
        prompt = text(800, seed)
        first, _ = complete(frontend, prompt)
        told = explain(cluster, frontend, prompt + text(100, 100 + seed))
        assert (told["chosen"], told["form"], told["policy"]) == (first, "completion", "kv")
        by_id = {one["id"]: one for one in told["candidates"]}
        assert by_id.keys() == workers
        assert by_id[first]["matched"] >= 800 // 16
        assert by_id[first]["cost"] == min(one["cost"] for one in told["candidates"])
        again, answer = complete(frontend, prompt + text(100, 100 + seed))
        assert again == first
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 784
    body = json.dumps({"prompt": text(800, 0)}).encode()
    request = urllib.request.Request(f"{frontend.url}/p2p/explain", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer_by_http:
        assert max(one["matched"] for one in json.load(answer_by_http)["candidates"]) >= 50
    with urllib.request.urlopen(f"{frontend.url}/metrics", timeout=10) as answer_by_http:
        metrics = answer_by_http.read().decode()
    assert 'p2pdyn_kv_streams{state="EXACT"} 3' in metrics
    assert "p2pdyn_router_decision_seconds_count 12" in metrics


def test_a_peer_that_routes_nothing_says_who_can_explain(cluster: Cluster) -> None:
    frontend = cluster.frontend("f")
    worker = cluster.worker("w", seeds=[frontend])
    command = ["explain", "x", "--at", worker.mesh, *cluster.key_args()]
    done = subprocess.run(
        [sys.executable, "-m", "p2pdyn", *command], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert "has no HTTP endpoint" in done.stderr


@pytest.mark.timeout(180)
def test_streams_repair_themselves_and_a_late_frontend_catches_up_under_load(cluster: Cluster) -> None:
    fronts = [cluster.frontend("f0")]
    fronts.append(cluster.frontend("f1", seeds=fronts))
    lossy = (sys.executable, str(Path(lossy_node.__file__)), str(LOST))
    engine = ("--no-http", "--", "--speedup", "0", "--kv-blocks", "600")
    workers = [cluster.start(f"w{i}", *engine, seeds=fronts[:1], program=lossy) for i in range(4)]
    for worker in workers:
        worker.wait_ready()
    for front in fronts:
        _wait_exact(cluster, front, 10)
    with Traffic(*fronts, *fronts) as traffic:
        for worker in workers:
            worker.signal(signal.SIGUSR1)
        time.sleep(LOSS_S)
        for worker in workers:
            worker.signal(signal.SIGUSR2)
        ended = time.monotonic()
        for front in fronts:
            left = ended + REPAIRED_S - time.monotonic()
            _wait_exact(cluster, front, left)
    assert not traffic.failed
    assert traffic.answered > 100
    _agree(cluster, fronts, workers)

    with Traffic(fronts[0], fronts[0]) as traffic:
        fronts[1].kill()
        late = cluster.frontend("f1", seeds=fronts[:1])
        with Traffic(late) as its_own:
            left = late.ready_at + LATE_S - time.monotonic()
            _wait_exact(cluster, late, left)
    assert not traffic.failed
    assert not its_own.failed
    assert its_own.answered
    _agree(cluster, [fronts[0], late], workers)


def _wait_exact(cluster: Cluster, front: NodeProcess, within: float) -> None:
    wait_for(lambda: all_exact(cluster, front, 4), within, lambda: f"exact everywhere: {streams(cluster, front)}")


def _agree(cluster: Cluster, fronts: list[NodeProcess], workers: list[NodeProcess]) -> None:
    """Frontends know every worker's cache block for block, now that nothing runs."""
    for worker in workers:
        own = blocks(cluster, worker, worker)
        assert sum(map(len, own["blocks"].values())) > 100 * 16
        for front in fronts:
            _wait_equal(cluster, front, worker, own)


def _wait_equal(cluster: Cluster, front: NodeProcess, worker: NodeProcess, own: dict[str, Any]) -> None:
    wait_for(lambda: blocks(cluster, front, worker) == own, 3, f"{front.id} agrees with {worker.id}")
