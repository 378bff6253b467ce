"""`p2pdyn quickstart`: the frontend, two workers and the one question, as a user runs it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.nodes import NodeProcess, wait_for

from p2pdyn.cli.chat import describe
from p2pdyn.cli.client import Client

ANSWERED = re.compile(r"\[answered by demo-w[12] \([0-9a-f]{16}\), \d+ tokens in \d+\.\d s(, length)?\]")


def quickstart(*args: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-m", "p2pdyn", "quickstart", *args],
        capture_output=True,
        text=True,
        timeout=170,
        env={key: value for key, value in os.environ.items() if not key.startswith("P2PDYN_")},
        check=False,
    )


def test_once_answers_shows_the_cluster_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = quickstart("--once", "--engine", "sim", "--http", "127.0.0.1:0")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ANSWERED.search(done.stdout)
    assert "3 peers, 3 ready" in done.stdout
    rows = {line.split()[0]: line.split()[2:5] for line in done.stdout.splitlines() if line.startswith("demo")}
    assert rows["demo*"] == ["ready", "frontend", "none"]
    assert rows["demo-w1"] == rows["demo-w2"] == ["ready", "aggregated", "sim"]
    assert list(tmp_path.iterdir()) == []
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[NodeProcess]:
    args = ("quickstart", "--workers", "1", "--engine", "sim", "--http", "127.0.0.1:0")
    node = NodeProcess(args, env={"TMPDIR": str(tmp_path)})
    yield node
    node.stop()


def test_it_serves_until_ctrl_c(serving: NodeProcess, tmp_path: Path) -> None:
    def invited() -> bool:
        return any("until Ctrl-C" in line for line in serving.lines) or serving.process.poll() is not None

    wait_for(invited, 30, "the invitation")
    [url] = {match[0] for line in serving.lines if (match := re.search(r"http://127\.0\.0\.1:\d+$", line))}
    client = Client(url)
    reply = client.chat("sim", [{"role": "user", "content": "hello"}], max_tokens=5)
    assert len("".join(reply.pieces)) == 5
    assert ANSWERED.search(describe(client, reply, 0.0))
    serving.signal(signal.SIGINT)
    assert serving.process.wait(20) == 0
    assert serving.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_told_with_its_mend() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = quickstart("--once", "--engine", "sim", "--http", address)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"p2pdyn: cannot listen on {address} (Address already in use): give a free port with --http HOST:PORT\n"
    )


def test_a_worker_that_cannot_start_ends_it_with_the_workers_sentence(tmp_path: Path) -> None:
    done = quickstart("--once", "--engine", "vllm", "--http", "127.0.0.1:0")
    assert done.returncode == 1
    assert "vllm" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(180)
@pytest.mark.parametrize("network", ["as it is", "none"])
def test_the_real_model_answers_in_english(network: str) -> None:
    prefix: tuple[str, ...] = ()
    if network == "none":
        if not shutil.which("unshare") or os.geteuid():
            pytest.skip("needs root and unshare")
        prefix = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    done = quickstart("--once", "--http", "127.0.0.1:0", prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert "SmolLM2" in done.stdout
    assert "Paris" in done.stdout
    assert ANSWERED.search(done.stdout)
