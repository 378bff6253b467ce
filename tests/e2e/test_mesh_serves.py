"""Several real processes on loopback, CURVE on: discovery by seeds, serving, loss and arrival of workers."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.nodes import Cluster, NodeProcess, make_key, wait_for

KILLED_S = 0.5
"""Longest that a stream may be silent, or a worker still be routed to, once its process is killed."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, make_key(tmp_path)) as nodes:
        yield nodes


def client(frontend: NodeProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", timeout=20, max_retries=0)


def ready_workers(frontend: NodeProcess, cluster: Cluster) -> list[dict[str, Any]]:
    report = frontend.peers(cluster.key)
    return [peer for peer in report["peers"] if peer["state"] == "ready" and peer["role"] != "frontend"]


def ask(frontend: NodeProcess, text: str = "Hello", **more: Any) -> Any:
    with client(frontend) as one:
        return one.chat.completions.create(model="sim", messages=[{"role": "user", "content": text}], **more)


def test_two_frontends_serve_what_two_workers_generate(cluster: Cluster) -> None:
    first = cluster.frontend("f1")
    second = cluster.frontend("f2", seeds=[first])
    workers = [cluster.worker(f"w{i}", seeds=[first]) for i in (1, 2)]
    for frontend in (first, second):
        wait_for(lambda f=frontend: len(ready_workers(f, cluster)) == 2, 10, "both workers seen by both frontends")
        answer = ask(frontend, max_tokens=12)
        assert answer.usage.completion_tokens == 12
        assert answer.choices[0].finish_reason == "length"
        assert answer.model_extra["p2pdyn"]["workers"][0] in {worker.id for worker in workers}
    one, two = (ask(f, "same question", max_tokens=24, temperature=0) for f in (first, second))
    assert one.choices[0].message.content == two.choices[0].message.content


@pytest.mark.alone
def test_a_killed_worker_is_out_of_routing_at_once_and_its_stream_goes_on(cluster: Cluster) -> None:
    frontend = cluster.frontend("f1")
    slow = ("--", "--itl-ms", "20")
    workers = {w.id: w for w in (cluster.worker(f"w{i}", *slow, seeds=[frontend]) for i in (1, 2))}
    wait_for(lambda: len(ready_workers(frontend, cluster)) == 2, 10, "both workers")
    undisturbed = ask(frontend, "count", max_tokens=60, temperature=0)
    with client(frontend) as one:
        stream = one.chat.completions.create(
            model="sim",
            messages=[{"role": "user", "content": "count"}],
            max_tokens=60,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={},
        )
        text, last = "", None
        victim = None
        heard = silence = 0.0
        for chunk in stream:
            now = time.monotonic()
            if victim is not None:
                silence, heard = max(silence, now - heard), now
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            last = chunk
            if victim is None and len(text) > 10:
                victim = stream.response.headers["x-p2pdyn-worker"]
                heard = time.monotonic()
                workers[victim].kill()
    assert victim is not None
    assert silence < KILLED_S
    assert text == undisturbed.choices[0].message.content
    assert last.usage.completion_tokens == 60
    survivor = next(w for w in workers if w != victim)
    assert last.model_extra["p2pdyn"] == {"workers": [victim, survivor], "migrations": 1}
    answers = [ask(frontend, f"question {i}", max_tokens=4) for i in range(8)]
    assert {a.model_extra["p2pdyn"]["workers"][0] for a in answers} == {survivor}


@pytest.mark.alone
def test_a_killed_idle_worker_is_out_of_routing_within_half_a_second(cluster: Cluster) -> None:
    frontend = cluster.frontend("f1")
    victim, survivor = (cluster.worker(f"w{i}", seeds=[frontend]) for i in (1, 2))
    wait_for(lambda: len(ready_workers(frontend, cluster)) == 2, 10, "both workers")
    for _ in range(4):
        ask(frontend, max_tokens=1)
    victim.kill()
    killed_at = time.monotonic()
    wait_for(lambda: links_up(frontend) == {survivor.id}, KILLED_S, "the victim out of routing", every=0.01)
    assert time.monotonic() - killed_at < KILLED_S
    served = {ask(frontend, max_tokens=1).model_extra["p2pdyn"]["workers"][0] for _ in range(20)}
    assert served == {survivor.id}


def links_up(frontend: NodeProcess) -> set[str]:
    """The workers that the frontend would send a request to."""
    with urllib.request.urlopen(f"{frontend.url}/metrics", timeout=10) as answer:
        return set(re.findall(r'worker_link_up{worker="(\w+)"} 1', answer.read().decode()))


@pytest.mark.alone
def test_a_new_worker_takes_traffic_within_a_second_of_ready(cluster: Cluster) -> None:
    frontend = cluster.frontend("f1")
    cluster.worker("w1", seeds=[frontend])
    wait_for(lambda: len(ready_workers(frontend, cluster)) == 1, 10, "the first worker")
    ask(frontend, max_tokens=2)
    late = cluster.start("w2", "--no-http", "--router", "round-robin", "--", "--speedup", "0", seeds=[frontend])
    late.wait_ready()

    def served_by_the_new_one() -> float | None:
        answer = ask(frontend, max_tokens=2)
        return time.monotonic() if answer.model_extra["p2pdyn"]["workers"] == [late.id] else None

    taken_at = wait_for(served_by_the_new_one, 5, "a request on the new worker", every=0.005)
    assert taken_at - late.ready_at < 1.0


def test_a_worker_whose_clock_and_data_dir_went_back_still_serves(cluster: Cluster, tmp_path: Path) -> None:
    """The cluster remembers a later life of it, so its epoch rises above that one, and its links follow."""
    frontend = cluster.frontend("f1")
    identity = tmp_path / "w1" / "identity.json"
    identity.parent.mkdir()
    later = int(time.time() * 1000) + 86_400_000
    identity.write_text(json.dumps({"node": "a" * 16, "epoch": later}))
    args = ("--port", str(free_base()), "--", "--speedup", "0")
    first = cluster.worker("w1", *args, seeds=[frontend])
    wait_for(lambda: len(ready_workers(frontend, cluster)) == 1, 10, "the worker")
    ask(frontend, max_tokens=1)
    first.kill()
    identity.write_text(json.dumps({"node": "a" * 16, "epoch": 0}))
    cluster.worker("w1", *args, seeds=[frontend])

    def epoch() -> int:
        return next(int(peer["epoch"]) for peer in ready_workers(frontend, cluster))

    wait_for(lambda: ready_workers(frontend, cluster) and epoch() > later + 1, 10, "the epoch above the later life's")
    for _ in range(4):
        answer = ask(frontend, max_tokens=3)
        assert (answer.usage.completion_tokens, answer.model_extra["p2pdyn"]["migrations"]) == (3, 0)
    assert json.loads(identity.read_text())["epoch"] == epoch()


def free_base() -> int:
    """The first of four ports that are free now."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError, OverflowError):
            base = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            for port in range(base + 1, base + 4):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return int(base)


def test_workers_of_unlike_weights_are_not_routed_together(cluster: Cluster) -> None:
    frontend = cluster.frontend("f1")
    first = cluster.worker("w1", seeds=[frontend])
    wait_for(lambda: len(ready_workers(frontend, cluster)) == 1, 10, "the first worker")
    others = [
        cluster.worker(f"w{i}", "--", "--speedup", "0", *weights, seeds=[frontend])
        for i, weights in enumerate([("--seed", "1"), ("--kv-bytes-per-block", "32")], 2)
    ]

    def odd() -> dict[str, str]:
        peers = frontend.peers(cluster.key)["peers"]
        return {peer["id"]: peer["detail"] for peer in peers if peer["state"] == "incompatible"}

    wait_for(lambda: odd().keys() == {other.id for other in others}, 10, lambda: f"both incompatible: {odd()}")
    assert all(first.id in detail and "weights" in detail for detail in odd().values())
    assert {ask(frontend, max_tokens=1).model_extra["p2pdyn"]["workers"][0] for _ in range(6)} == {first.id}


def test_a_frontend_without_workers_says_so(cluster: Cluster) -> None:
    frontend = cluster.frontend("f1")
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(frontend)
    assert unknown.value.body["code"] == "model_not_found"  # type: ignore[index]
    worker = cluster.worker("w1", seeds=[frontend])
    wait_for(lambda: ready_workers(frontend, cluster), 10, "the worker")
    ask(frontend, max_tokens=2)
    assert worker.stop() == 0

    wait_for(lambda: not ready_workers(frontend, cluster), 5, "the worker to be gone")
    with pytest.raises(openai.InternalServerError) as unavailable:
        ask(frontend, max_tokens=2)
    assert unavailable.value.status_code == 503
    assert unavailable.value.response.headers["retry-after"]
