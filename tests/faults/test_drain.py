"""Nodes that go: by `p2pdyn drain` or a signal, under load, the last of their model, supervised, frontends too."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from support import brief_drain
from support.nodes import Cluster, NodeProcess, _clean_environment, make_key, wait_for
from support.pd import Asked, PdCluster, prompt

from p2pdyn.core.types import Address
from p2pdyn.net.admin import admin_call
from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets

FINISH_S, LIMIT_S = 0.5, 4.0
BRIEF = (sys.executable, brief_drain.__file__, str(FINISH_S), str(LIMIT_S))
"""A node whose drain has these deadlines."""
ITL = ("--", "--itl-ms", "20")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, make_key(tmp_path)) as nodes:
        yield nodes


def worker(cluster: Cluster, name: str, seed: NodeProcess, *args: str) -> NodeProcess:
    return cluster.start(name, "--no-http", *(args or ITL), seeds=[seed], program=BRIEF)


def start(cluster: Cluster, workers: int = 2) -> tuple[NodeProcess, list[NodeProcess]]:
    """A frontend and workers that it sees ready."""
    frontend = cluster.start("f", "--http", "127.0.0.1:0", engine="none", program=BRIEF).wait_ready()
    nodes = [worker(cluster, f"w{i + 1}", frontend) for i in range(workers)]
    for node in nodes:
        node.wait_ready()
    ready(frontend, cluster, *nodes)
    return frontend, nodes


def ready(frontend: NodeProcess, cluster: Cluster, *nodes: NodeProcess) -> None:
    """The frontend has these, and no other workers."""
    wait_for(
        lambda: (
            {id for id, peer in peers(frontend).items() if (peer["state"], peer["role"]) == ("ready", "aggregated")}
            == {node.id for node in nodes}
        ),
        20,
        lambda: f"the workers ready: {peers(frontend)}",
    )


def peers(frontend: NodeProcess) -> dict[str, dict[str, Any]]:
    with urllib.request.urlopen(f"{frontend.url}/p2p/peers", timeout=10) as answer:
        return {peer["id"]: peer for peer in json.load(answer)["peers"]}


def drain(cluster: Cluster, node: str, at: NodeProcess, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "p2pdyn", "drain", node, "--at", at.mesh, *cluster.key_args(), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env=_clean_environment(), check=False)


class Stream:
    """A streamed chat; what comes is read in a thread."""

    def __init__(self, frontend: NodeProcess, text: str, tokens: int, **more: Any) -> None:
        self.text, self.events = "", 0
        self.error: Exception | None = None
        self.last: Any = None
        self._thread = threading.Thread(target=self._read, args=(frontend, text, tokens, more))
        self._thread.start()

    def _read(self, frontend: NodeProcess, text: str, tokens: int, more: dict[str, Any]) -> None:
        try:
            with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", timeout=30, max_retries=0) as client:
                for chunk in client.chat.completions.create(
                    model="sim", messages=[{"role": "user", "content": text}], max_tokens=tokens, temperature=0,
                    stream=True, stream_options={"include_usage": True}, **more,
                ):  # fmt: skip
                    self.text += "".join(choice.delta.content or "" for choice in chunk.choices)
                    self.events += 1
                    self.last = chunk
        except Exception as error:
            self.error = error

    def begun(self) -> Stream:
        wait_for(lambda: self.events > 2 or self.error, 10, "tokens")
        return self

    def worker(self, frontend: NodeProcess) -> str:
        return next(id for id, peer in peers(frontend).items() if peer["load"]["active_requests"])

    def end(self) -> Stream:
        self._thread.join(40)
        assert not self._thread.is_alive(), "the stream has not ended"
        return self

    @property
    def facts(self) -> dict[str, Any]:
        """The last chunk's own."""
        found: dict[str, Any] = self.last.model_extra["p2pdyn"]
        return found


def code(error: Exception | None) -> Any:
    assert isinstance(error, openai.APIError), error
    return error.body["code"]  # type: ignore[index]


def test_a_rolling_restart_of_every_worker_under_load_changes_no_answer(cluster: Cluster) -> None:
    frontend, nodes = start(cluster, 3)
    questions = [f"question {i}" for i in range(4)]
    tokens = 120

    def ask(question: str) -> tuple[str, int, int]:
        stream = Stream(frontend, question, tokens).end()
        assert stream.error is None, stream.error
        return stream.text, stream.last.usage.completion_tokens, stream.facts["migrations"]

    with ThreadPoolExecutor(8) as pool:
        undisturbed = dict(zip(questions, pool.map(ask, questions), strict=True))
        assert {counts for _, *counts in map(list, undisturbed.values()) for counts in [tuple(counts)]} == {(tokens, 0)}
        over = threading.Event()

        def load(question: str) -> list[tuple[str, int, int]]:
            answers = []
            while not over.is_set():
                answers.append(ask(question))
            return answers

        loads = {question: pool.submit(load, question) for question in questions}
        for i, node in enumerate(nodes):
            done = drain(cluster, node.id, frontend)
            assert done.returncode == 0, done.stderr
            assert node.process.wait(10) == 0
            nodes[i] = worker(cluster, f"w{i + 1}", frontend).wait_ready()
            assert nodes[i].id == node.id
            ready(frontend, cluster, *nodes)
        over.set()
        answers = [(question, *answer) for question, running in loads.items() for answer in running.result()]
    assert {(question, text) for question, text, *_ in answers} == {(q, a[0]) for q, a in undisturbed.items()}
    assert {count for _, _, count, _ in answers} == {tokens}
    assert sum(moves for *_, moves in answers) > 0


def test_what_cannot_be_moved_finishes_or_ends_with_its_error(cluster: Cluster) -> None:
    """On a worker streams with a penalty, one that ends within the limit and one that does not; then a frontend's."""
    frontend, (first, second) = start(cluster)
    pin = {"x-p2pdyn-pin": first.id}
    soon = Stream(frontend, "a", 60, presence_penalty=0.5, extra_headers=pin)
    late = Stream(frontend, "b", 1000, presence_penalty=0.5, extra_headers=pin)
    pinned = Stream(frontend, "c", 60, extra_headers=pin)
    for stream in (soon, late, pinned):
        stream.begun()
    assert call(cluster, frontend, "drain", {"node": "w1"})["streams"] == 3
    done = drain(cluster, "w1", frontend)
    assert done.returncode == 0, done.stderr
    for stream in (soon.end(), pinned.end()):
        assert stream.error is None
        assert stream.facts == {"workers": [first.id], "migrations": 0}
        assert stream.last.usage.completion_tokens == 60
    assert code(late.end().error) == "worker_lost"
    assert first.process.wait(10) == 0
    assert Stream(frontend, "d", 5).end().facts["workers"] == [second.id]
    cut = Stream(frontend, "e", 1000).begun()
    done = drain(cluster, "f", second)
    assert done.returncode == 0, done.stderr
    assert "1 answer left" in done.stderr
    assert code(cut.end().error) == "draining"
    assert frontend.process.wait(10) == 0


def test_the_last_worker_of_a_model_goes_with_force_only(cluster: Cluster) -> None:
    frontend = cluster.frontend("f")
    nodes = [
        worker(cluster, "w", frontend, "--data-dir", str(cluster.folder / place), *ITL).wait_ready() for place in "ab"
    ]
    first, second = nodes
    ready(frontend, cluster, *nodes)
    for node, sentence in (
        ("nobody", "there is no node 'nobody'"),
        ("w", "2 nodes are called 'w': name one by its id"),
    ):
        done = drain(cluster, node, frontend)
        assert (done.returncode, done.stdout) == (1, "")
        assert sentence in done.stderr
    assert drain(cluster, first.id, second).returncode == 0
    assert drain(cluster, first.id, frontend).returncode == 0, "it has left already"
    refused = drain(cluster, "w", frontend)
    assert refused.returncode == 1
    assert f"node w ({second.id}) is the last ready worker of model 'sim'" in refused.stderr
    assert "--force" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert Stream(frontend, "still here", 5).end().error is None
    forced = drain(cluster, "w", second, "--force")
    assert forced.returncode == 0, forced.stderr
    assert second.process.wait(10) == 0
    assert Stream(frontend, "nobody", 5).end().error is not None


def test_a_second_drain_waits_for_the_first(cluster: Cluster) -> None:
    frontend, (first, _) = start(cluster)
    pin = {"x-p2pdyn-pin": first.id}
    stream = Stream(frontend, "long", 1000, presence_penalty=0.5, extra_headers=pin).begun()
    call(cluster, first, "drain", {"node": first.id})
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda at: drain(cluster, "w1", at), (frontend, first)))
    assert [done.returncode for done in both] == [0, 0], [done.stderr for done in both]
    assert all("1 stream left" in done.stderr and "has left" in done.stderr for done in both)
    assert code(stream.end().error) == "worker_lost"


def test_a_node_that_is_killed_while_it_drains(cluster: Cluster) -> None:
    frontend = cluster.frontend("f")
    nodes = {node.id: node for node in (cluster.worker(f"w{i}", *ITL, seeds=[frontend]) for i in (1, 2))}
    ready(frontend, cluster, *nodes.values())
    stream = Stream(frontend, "long", 200).begun()
    victim = nodes.pop(stream.worker(frontend))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(drain, cluster, victim.id, frontend)
        wait_for(lambda: peers(frontend)[victim.id]["state"] == "draining", 10, "draining")
        victim.kill()
        done = asked.result()
    assert done.returncode == 1
    assert "died while it drained" in done.stderr
    assert stream.end().error is None
    assert stream.facts == {"workers": [victim.id, *nodes], "migrations": 1}


@pytest.mark.alone
def test_sigterm_drains_and_a_second_one_ends_at_once(cluster: Cluster) -> None:
    frontend = cluster.frontend("f")
    nodes = {node.id: node for node in (cluster.worker(f"w{i}", *ITL, seeds=[frontend]) for i in (1, 2))}
    ready(frontend, cluster, *nodes.values())
    stream = Stream(frontend, "long", 200).begun()
    first = nodes.pop(stream.worker(frontend))
    (other,) = nodes.values()
    first.signal(signal.SIGTERM)
    wait_for(lambda: peers(frontend)[first.id]["state"] == "draining", 10, "draining")
    assert Stream(frontend, "meanwhile", 5).end().facts["workers"] == [other.id]
    assert first.process.poll() is None
    first.signal(signal.SIGTERM)
    assert first.process.wait(10) == 0
    assert stream.end().error is None
    assert stream.facts == {"workers": [first.id, other.id], "migrations": 1}


class Retrying:
    """A client with several base URLs: what one does not take at all goes to the next."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.clients = [openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=30, max_retries=0) for url in urls]
        self.retries = 0

    def __call__(self, text: str, tokens: int) -> str:
        """The streamed answer; an error once it has begun is not retried."""
        for tries in range(200):
            client = self.clients[tries % len(self.clients)]
            try:
                stream = client.chat.completions.create(
                    model="sim", messages=[{"role": "user", "content": text}], max_tokens=tokens, temperature=0,
                    stream=True,
                )  # fmt: skip
            except (openai.APIConnectionError, openai.InternalServerError):
                self.retries += 1
                time.sleep(0.05)
                continue
            return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
        raise AssertionError("nobody takes it")


def refused_by(frontend: NodeProcess) -> dict[str, str]:
    """The headers with which a draining endpoint refuses a generation."""
    connection = http.client.HTTPConnection(frontend.url.removeprefix("http://"), timeout=10)
    try:
        body = json.dumps({"model": "sim", "prompt": "hello", "max_tokens": 1})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["error"]["code"]) == (503, "draining")
        return {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def is_ready(frontend: NodeProcess) -> bool:
    connection = http.client.HTTPConnection(frontend.url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    finally:
        connection.close()


def test_a_rolling_restart_of_all_frontends_loses_no_request_of_a_retrying_client(cluster: Cluster) -> None:
    ports = [free_port(), free_port()]
    frontends = [cluster.frontend("f0", "--http", f"127.0.0.1:{ports[0]}")]
    frontends.append(cluster.frontend("f1", "--http", f"127.0.0.1:{ports[1]}", seeds=frontends))
    node = worker(cluster, "w", frontends[0]).wait_ready()
    for frontend in frontends:
        ready(frontend, cluster, node)
    client = Retrying([frontend.url for frontend in frontends])
    undisturbed = client("hello", 30)
    over = threading.Event()

    def load(_: int) -> set[str]:
        answers = set()
        while not over.is_set():
            answers.add(client("hello", 30))
        return answers

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(load, i) for i in range(3)]
        for i in (0, 1):
            old = frontends[i]
            stream = Stream(old, "long", 120).begun()
            old.signal(signal.SIGTERM)
            wait_for(lambda node=old: not is_ready(node), 10, "the endpoint not ready")
            headers = refused_by(old)
            assert (headers["connection"], headers["retry-after"]) == ("close", "1")
            assert stream.end().error is None
            assert stream.last.usage.completion_tokens == 120
            assert old.process.wait(10) == 0
            frontends[i] = cluster.frontend(f"f{i}", "--http", f"127.0.0.1:{ports[i]}", seeds=[node])
            ready(frontends[i], cluster, node)
        over.set()
        answers = set().union(*(one.result() for one in running))
    for one in client.clients:
        one.close()
    assert answers == {undisturbed}
    assert client.retries > 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_supervised_workers_stay_down_until_sighup_and_go_with_their_supervisor(cluster: Cluster) -> None:
    node = cluster.start("n", "--http", "127.0.0.1:0", "--workers", "2", "--", "--speedup", "0").wait_ready()
    named = lambda: {peer["name"]: peer for peer in peers(node).values()}  # noqa: E731
    before = named()["n-w1"]
    done = drain(cluster, "n-w1", node)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: "worker n-w1 was drained: it stays down" in node.stderr, 5, "the supervisor says so")
    refused = drain(cluster, "n", node)
    assert refused.returncode == 1
    assert "is the last ready worker of model 'sim'" in refused.stderr
    node.signal(signal.SIGHUP)
    wait_for(
        lambda: named()["n-w1"]["state"] == "ready" and named()["n-w1"]["epoch"] > before["epoch"], 15, "it is back"
    )
    assert Stream(node, "hello", 5).end().error is None
    done = drain(cluster, "n", node, "--force")
    assert done.returncode == 0, done.stderr
    assert "workers left" in done.stderr
    assert node.process.wait(10) == 0
    assert "starts again" not in node.stderr


def test_a_draining_prefill_worker_keeps_what_a_decode_worker_is_about_to_take(
    cluster: Cluster, tmp_path: Path
) -> None:
    pd, hold = PdCluster(cluster, "sim", "tcp"), tmp_path / "hold"
    giver, taker = pd.start("p", "prefill"), pd.start("d", "decode", hold=hold)
    pd.ready()
    text = prompt(800, 1)
    undisturbed = pd.complete(text)[0]
    text = prompt(800, 2)
    (hold / "before").touch()
    asked = Asked(pd, text)
    pd.stage(taker, "reading")
    report = call(cluster, giver, "drain", {"node": giver.id})
    (hold / "before").unlink()
    assert (report["state"], report["streams"], report["leases"]) == ("draining", 0, 1)
    answer = asked.answer()
    assert giver.process.wait(15) == 0
    assert answer == pd.complete(text)[0] != undisturbed
    pd.all_given_back(taker)


def call(cluster: Cluster, node: NodeProcess, op: str, args: dict[str, Any]) -> dict[str, Any]:
    """An admin operation without the time that a command takes to start."""
    assert cluster.key is not None
    security = Security.load(cluster.key)

    async def ask() -> dict[str, Any]:
        sockets = Sockets(security)
        try:
            return await admin_call(sockets, Address.parse(node.mesh), op, args, 5)
        finally:
            sockets.close()

    return asyncio.run(ask())
