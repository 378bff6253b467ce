"""`p2pdyn node` as a process: its one line, its signals, its ways to fail."""

from __future__ import annotations

import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.nodes import NodeProcess, wait_for

from p2pdyn.datadir import DataDir

Start = Callable[..., NodeProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    nodes: list[NodeProcess] = []

    def one(*args: str) -> NodeProcess:
        nodes.append(NodeProcess(["node", "--engine", "sim", "--port", "0", "--data-dir", str(tmp_path / "n"), *args]))
        return nodes[-1]

    yield one
    for node in nodes:
        node.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_line_when_ready_and_a_clean_end(start: Start, number: int) -> None:
    node = start("--no-http").wait_ready()
    assert node.ready is not None
    assert (node.ready["http"], node.ready["model"], node.ready["role"]) == ("off", "sim", "aggregated")
    assert len(node.lines) == 1
    node.signal(number)
    assert node.process.wait(10) == 0
    assert "Traceback" not in node.stderr


def status(node: NodeProcess, key: str) -> int:
    request = urllib.request.Request(f"{node.url}/v1/models", headers={"authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_sighup_reads_the_api_keys_again_and_keeps_them_if_the_file_is_broken(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("the-first-key\n")
    node = start("--http", "127.0.0.1:0", "--api-key-file", str(keys)).wait_ready()
    assert (status(node, "the-first-key"), status(node, "the-second-key")) == (200, 401)

    keys.write_text("the-second-key\n")
    node.signal(signal.SIGHUP)
    wait_for(lambda: status(node, "the-second-key") == 200, 5, "the new key is accepted")
    assert status(node, "the-first-key") == 401

    def errors() -> list[str]:
        return [line for line in node.errors if " ERROR " in line]

    for broken in (b"", b"short\n", b"\xff\xfe\n"):
        before = len(errors())
        keys.write_bytes(broken)
        node.signal(signal.SIGHUP)
        said = wait_for(lambda n=before: errors()[n:], 5, "one sentence")
        assert len(said) == 1
        assert str(keys) in said[0]
        assert "in use stay" in said[0]
        assert (status(node, "the-second-key"), status(node, "short")) == (200, 401)
    keys.unlink()
    node.signal(signal.SIGHUP)
    wait_for(lambda: "No such file" in node.stderr, 5, "the missing file is named")
    assert status(node, "the-second-key") == 200


def test_sighup_does_not_end_a_node_without_an_endpoint(start: Start) -> None:
    node = start("--no-http").wait_ready()
    node.signal(signal.SIGHUP)
    wait_for(lambda: "nothing to read again" in node.stderr, 5, "it says so")
    assert node.process.poll() is None


def test_log_level(start: Start) -> None:
    node = start("--no-http", "--log-level", "error").wait_ready()
    assert node.stop() == 0
    assert node.stderr == ""


def failed(node: NodeProcess, code: int) -> str:
    """The sentence of a node that ends by itself."""
    assert node.process.wait(15) == code
    node.stop()
    assert node.lines == []
    return node.errors[-1]


def test_a_taken_http_port(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = failed(start("--http", f"127.0.0.1:{port}"), 1)
    assert sentence.startswith(f"p2pdyn: the HTTP endpoint cannot listen on 127.0.0.1:{port}")
    assert "--http HOST:PORT" in sentence


def test_a_data_dir_in_use(start: Start, tmp_path: Path) -> None:
    with DataDir(tmp_path / "n"):
        assert "give this node its own --name or --data-dir" in failed(start("--no-http"), 2)


def test_a_wrong_engine_argument(start: Start) -> None:
    assert "--nonsense" in failed(start("--no-http", "--", "--nonsense", "1"), 2)


def test_settings_from_a_file(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('engine = "sim"\nno-http = true\nserved-model-name = "from-file"\nengine-args = ["--speedup", 0]\n')
    node = start("--config", str(path)).wait_ready()
    assert node.ready is not None
    assert node.ready["model"] == "from-file"
