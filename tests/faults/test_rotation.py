"""The cluster key is replaced while the cluster serves: three processes, each with its own copy of the key file."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvloop
from support.nodes import Cluster, NodeProcess, make_key, wait_for

from p2pdyn.core.types import Address
from p2pdyn.net.admin import admin_call
from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets

TOKENS = 40


class Load:
    """Streams one greedy answer after another on ``lanes`` connections and notes each that is not the right one."""

    def __init__(self, frontend: NodeProcess, lanes: int) -> None:
        self.wrong: list[str] = []
        self.done = 0
        self._client = openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", timeout=30, max_retries=0)
        self._right = self._ask()
        self._stop = threading.Event()
        self._lanes = [threading.Thread(target=self._run) for _ in range(lanes)]

    def _ask(self) -> tuple[str, int]:
        stream = self._client.chat.completions.create(
            model="sim",
            messages=[{"role": "user", "content": "go on"}],
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, tokens = "", 0
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return text, tokens

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._ask()
            except openai.OpenAIError as error:
                self.wrong.append(repr(error))
                continue
            if answer != self._right:
                self.wrong.append(f"{answer!r} instead of {self._right!r}")
            self.done += 1

    def __enter__(self) -> Load:
        for lane in self._lanes:
            lane.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for lane in self._lanes:
            lane.join()
        self._client.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as nodes:
        yield nodes


def keygen(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "p2pdyn", "keygen", *args], check=True, capture_output=True)


class Rotation:
    """Three peers, and the key files that they were given."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.master = make_key(folder)
        self.files = {name: folder / f"{name}.key" for name in ("f", "w1", "w2")}
        for file in self.files.values():
            shutil.copy(self.master, file)
        self.nodes: dict[str, NodeProcess] = {}
        self.cluster = cluster
        self.frontend = self._start("f", "--http", "127.0.0.1:0", engine="none")
        for name in ("w1", "w2"):
            self._start(name, "--no-http", "--", "--itl-ms", "10")
        for node in self.nodes.values():
            node.wait_ready()

    def _start(self, name: str, *args: str, engine: str = "sim") -> NodeProcess:
        seeds = list(self.nodes.values())[:1]
        key = ("--cluster-key", str(self.files[name]), "--listen", "127.0.0.1")
        node = self.nodes[name] = self.cluster.start(name, *key, *args, engine=engine, seeds=seeds)
        return node.wait_ready()

    def give(self, name: str) -> None:
        """The present key file to one node, which takes it at SIGHUP."""
        node = self.nodes[name]
        said = node.stderr.count("cluster key: read again")
        shutil.copy(self.master, self.files[name])
        node.signal(signal.SIGHUP)
        wait_for(lambda: node.stderr.count("cluster key: read again") > said, 10, f"{name} took its key: {node.stderr}")

    def restart(self, name: str) -> None:
        shutil.copy(self.master, self.files[name])
        assert self.nodes[name].stop() == 0
        self._start(name, "--no-http", "--", "--itl-ms", "10")

    def whole(self) -> bool:
        """Every peer sees every other one as ready, asked with that peer's own key file, and is refused by none."""
        return all(
            [peer["state"] for peer in self.report(name)["peers"]].count("ready") == len(self.nodes)
            for name in self.nodes
        )

    def report(self, name: str) -> dict[str, Any]:
        """Its view, asked with its own key file; in this process, because it is asked often."""

        async def ask() -> dict[str, Any]:
            sockets = Sockets(Security.load(self.files[name]))
            try:
                host, _, port = self.nodes[name].mesh.rpartition(":")
                return await admin_call(sockets, Address(host, int(port)), "peers", {}, 10)
            finally:
                sockets.close()

        return uvloop.run(ask())


def test_a_rotation_by_signal_under_load_fails_no_request(cluster: Cluster, tmp_path: Path) -> None:
    rotation = Rotation(cluster, tmp_path)
    wait_for(rotation.whole, 20, "three ready peers")
    old = shutil.copy(rotation.master, tmp_path / "old.key")
    with Load(rotation.frontend, 4) as load:
        for step in ("--add", "--swap", "--drop"):
            keygen(step, str(rotation.master))
            for name in rotation.nodes:
                rotation.give(name)  # from here on until the last one, this node's file is another than its peers'
                wait_for(rotation.whole, 20, f"{name} after {step} is seen, and sees")
                seen = load.done
                wait_for(lambda seen=seen: load.done >= seen + 8, 20, "requests go on")
    assert load.wrong == []
    assert load.done > 50
    states = {name: [p["epoch"] for p in rotation.report(name)["peers"]] for name in rotation.nodes}
    assert len({tuple(sorted(epochs)) for epochs in states.values()}) == 1
    with pytest.raises(AssertionError, match="hung up on this peer's cluster key"):
        rotation.frontend.peers(old)


def test_a_rotation_by_restarts_of_the_workers_fails_no_request(cluster: Cluster, tmp_path: Path) -> None:
    """The step that matters, both ways mixed: workers restart with the swapped file, then the frontend takes it."""
    rotation = Rotation(cluster, tmp_path)
    keygen("--add", str(rotation.master))
    for name in rotation.nodes:
        rotation.give(name)
    wait_for(rotation.whole, 20, "three ready peers")
    keygen("--swap", str(rotation.master))
    with Load(rotation.frontend, 4) as load:
        for name in ("w1", "w2"):
            rotation.restart(name)
            wait_for(rotation.whole, 20, f"{name} is seen, and sees")
        rotation.give("f")
        wait_for(rotation.whole, 20, "the frontend is seen, and sees")
    assert load.wrong == []
    assert load.done > 20


def test_a_key_file_that_cannot_be_used_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    cluster.key = make_key(tmp_path)
    frontend = cluster.frontend("f")
    good = cluster.key.read_bytes()
    for content, mode, why in (
        (b"p2pdyn-cluster-key-1 zz\n", 0o600, "no cluster key"),
        (b"", 0o600, "holds 0 keys"),
        (good, 0o644, "is open to other users"),
    ):
        cluster.key.write_bytes(content)
        cluster.key.chmod(mode)
        frontend.signal(signal.SIGHUP)
        wait_for(lambda why=why: why in frontend.stderr, 10, f"the node says {why}")
    cluster.key.write_bytes(good)
    cluster.key.chmod(0o600)
    assert [peer["state"] for peer in frontend.peers(cluster.key)["peers"]] == ["ready"]
    assert good.split()[-1].decode() not in frontend.stderr
    assert Security.load(cluster.key).keys[0].secret.decode() not in frontend.stderr
