"""`p2pdyn node --workers` with real processes, the sim engine and CURVE."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.nodes import NodeProcess, wait_for

from p2pdyn.config import load
from p2pdyn.datadir import DataDir
from p2pdyn.net.curve import write_key_file
from p2pdyn.supervisor import arguments


def test_a_worker_is_told_everything_on_its_command_line(tmp_path: Path) -> None:
    flags = {"engine": "sim", "workers": 2, "insecure": True, "port": 9000, "data_dir": "/d", "name": "n"}
    config = load({**flags, "engine_args": ("--itl-ms", "5"), "offline": True}, {})
    assert arguments(config, 1, "10.0.0.1:9000", 42) == [
        *("node", "--no-http", "--no-mdns", "--insecure", "--offline", "--engine=sim", "--role=aggregated"),
        *("--port=9020", "--seed=10.0.0.1:9000", "--cluster=default", "--data-dir=/d/w2", "--name=n-w2"),
        *("--kv-transfer=auto", "--log-level=info", "--supervised-by=42", "--", "--itl-ms", "5"),
    ]


class Supervised:
    """A supervisor with its workers, and what is to be known of them."""

    def __init__(self, folder: Path, *args: str, port: int = 0) -> None:
        self.key = folder / "cluster.key"
        if not self.key.exists():
            write_key_file(self.key)
        common = ["--listen", "127.0.0.1", "--port", str(port), "--cluster-key", str(self.key), "--name", "n"]
        engine = ["--engine", "sim", "--http", "127.0.0.1:0"]
        self.data = folder / "data"
        self.node = NodeProcess(["node", *common, *engine, "--data-dir", str(self.data), *args])

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *exception: object) -> None:
        self.node.stop()

    def workers(self) -> list[psutil.Process]:
        return list(psutil.Process(self.node.process.pid).children(recursive=True))

    def peers(self) -> dict[str, Any]:
        report = self.node.peers(self.key)
        return {peer["name"]: peer for peer in report["peers"]}


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Supervised]:
    with Supervised(tmp_path, "--workers", "2", "--", "--speedup", "0") as one:
        yield one


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_one_ready_line_when_all_are_ready(two: Supervised) -> None:
    two.node.wait_ready()
    assert len(two.node.lines) == 1
    assert two.node.ready is not None
    assert (two.node.ready["model"], two.node.ready["role"]) == ("sim", "aggregated")
    peers = two.peers()
    assert {name: peer["state"] for name, peer in peers.items()} == dict.fromkeys(("n", "n-w1", "n-w2"), "ready")
    assert peers["n"]["engine"] == "none"
    assert peers["n-w1"]["http"] is None
    assert len(two.workers()) == 2
    assert {path.name for path in two.data.iterdir()} >= {"w1", "w2"}


def test_sigterm_drains_all_and_leaves_nothing(two: Supervised) -> None:
    two.node.wait_ready()
    workers = two.workers()
    assert two.node.stop() == 0
    assert gone(workers)
    assert "Traceback" not in two.node.stderr
    assert "starts again" not in two.node.stderr


def test_a_killed_worker_comes_back_as_itself(two: Supervised) -> None:
    two.node.wait_ready()
    before = two.peers()["n-w1"]
    victim = next(p for p in two.workers() if f"--data-dir={two.data}/w1" in p.cmdline())
    victim.kill()
    wait_for(lambda: "worker n-w1 ended (killed by signal 9); starts again in 1 s" in two.node.stderr, 5, "the news")
    after = wait_for(lambda: newer(two.peers()["n-w1"], before), 15, "n-w1 ready again")
    assert after["id"] == before["id"]
    assert len(two.node.lines) == 1


def newer(peer: dict[str, Any], than: dict[str, Any]) -> dict[str, Any] | None:
    return peer if peer["epoch"] > than["epoch"] and peer["state"] == "ready" else None


def test_workers_die_with_a_killed_supervisor(two: Supervised) -> None:
    two.node.wait_ready()
    workers = two.workers()
    two.node.kill()
    wait_for(lambda: gone(workers), 5, "the workers' end")


def stream(one: Supervised, tokens: int) -> http.client.HTTPConnection:
    """A connection on which an answer of so many tokens has begun."""
    client = http.client.HTTPConnection(one.node.url.removeprefix("http://"), timeout=10)
    body = {"model": "sim", "prompt": "hello", "max_tokens": tokens, "stream": True}
    client.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    return client


def test_what_runs_when_sigterm_comes_is_finished(tmp_path: Path) -> None:
    with Supervised(tmp_path, "--workers", "2", "--", "--itl-ms", "50") as one:
        one.node.wait_ready()
        with contextlib.closing(stream(one, tokens=40)) as client:
            answer = client.getresponse()
            answer.readline()
            one.node.signal(signal.SIGTERM)
            rest = answer.read().decode()
        assert rest.count('"text"') >= 38
        assert rest.rstrip().endswith("[DONE]")
        assert one.node.process.wait(10) == 0


def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    # A request of this length runs for minutes; the first signal waits for it.
    with Supervised(tmp_path, "--workers", "1", "--", "--itl-ms", "1000") as one:
        one.node.wait_ready()
        with contextlib.closing(stream(one, tokens=200)) as client:
            assert client.getresponse().status == 200
            one.node.signal(signal.SIGTERM)
            wait_for(lambda: one.peers()["n"]["state"] == "draining", 5, "draining")
            one.node.signal(signal.SIGTERM)
            assert one.node.process.wait(6) == 0


def test_it_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "p2pdyn", "node", "--engine", "sim", "--workers", "1", "--no-http", "--port", "0"]
    command += ["--data-dir", str(tmp_path), "--", "--speedup", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"ready ")
        process.stderr.close()
        [worker] = psutil.Process(process.pid).children()
        worker.kill()
        again = wait_for(lambda: psutil.Process(process.pid).children(), 10, "the worker's next life")
        process.terminate()
        assert process.wait(15) == 0
        assert gone([worker, *again])


def test_stopping_while_workers_start(two: Supervised) -> None:
    wait_for(two.workers, 10, "a worker process")
    workers = two.workers()
    assert two.node.stop() == 0
    assert gone(workers)


def test_a_misconfigured_worker_ends_it_with_the_workers_sentence(tmp_path: Path) -> None:
    with DataDir(tmp_path / "data" / "w2"), Supervised(tmp_path, "--workers", "2") as one:
        assert one.node.process.wait(20) == 2
    assert f"is in use by process {os.getpid()}" in one.node.stderr
    assert one.node.lines == []


def test_unlike_workers_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text("""
[[workers]]
name = "big"
served-model-name = "large"
engine-args = ["--speedup", 0, "--kv-blocks", 64]
[[workers]]
name = "small"
served-model-name = "little"
""")
    with Supervised(tmp_path, "--config", str(path)) as one:
        one.node.wait_ready()
        assert one.node.ready is not None
        assert one.node.ready["model"] == "large,little"
        assert {name: peer["models"] for name, peer in one.peers().items()} == {
            "n": [],
            "big": ["large"],
            "small": ["little"],
        }
        assert one.node.stop() == 0
