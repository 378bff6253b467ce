"""Real nodes with workers of an engine that is long in loading, behind one endpoint, asked by the official client."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai

from support.ahead import Ahead, Place
from support.nodes import Cluster, NodeProcess, make_key, wait_for
from support.pd import prompt
from support.vllm_engine import START_S

LONG = 3000
"""Tokens of a first turn: letters, one each."""
SEEN_S = 20.0
"""What is so is known to the endpoint after this long."""


class EngineCluster:
    """A frontend, and workers with the engine and the model of ``place.lab``."""

    def __init__(self, place: Place, name: str) -> None:
        folder = place.folders.mktemp(name)
        self.cluster = place.ends.enter_context(Cluster(folder, make_key(folder)))
        self.frontend = self.cluster.frontend("f")
        self.workers: list[NodeProcess] = []
        self._lab = place.lab

    def begin(self, name: str, *flags: str) -> NodeProcess:
        """A worker that is loading."""
        lab = self._lab
        args = (*flags, "--model", str(lab.model), "--offline", "--", *lab.args)
        worker = self.cluster.start(name, *args, engine=lab.kind, seeds=[self.frontend])
        self.workers.append(worker)
        return worker

    def wait_ready(self) -> None:
        """Until the endpoint knows all workers."""
        for worker in self.workers:
            worker.wait_ready(START_S)
        wait_for(lambda: len(self.ready()) == len(self.workers), SEEN_S, "all workers, seen by the endpoint")

    def peers(self) -> list[dict[str, Any]]:
        """The workers, as the endpoint sees them."""
        with urllib.request.urlopen(f"{self.frontend.url}/p2p/peers", timeout=10) as page:
            return [peer for peer in json.load(page)["peers"] if peer["role"] != "frontend"]

    def ready(self) -> list[dict[str, Any]]:
        return [peer for peer in self.peers() if peer["state"] == "ready"]

    def used(self) -> list[int]:
        """KV blocks of each worker that is ready; -1 where the endpoint does not know."""
        return [-1 if peer["load"]["kv_used"] is None else peer["load"]["kv_used"] for peer in self.ready()]

    def explained(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """Where this would go now, and why."""
        body = json.dumps({"model": "tiny", "messages": messages}).encode()
        asked = urllib.request.Request(f"{self.frontend.url}/p2p/explain", body, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=10) as page:
            told: dict[str, Any] = json.load(page)
        return told

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.frontend.url}/v1", api_key="none", timeout=90, max_retries=0)

    def named(self, worker: str) -> NodeProcess:
        return next(one for one in self.workers if one.id == worker)


def begun_apart(place: Place) -> EngineCluster:
    """One prefill and one decode worker."""
    cluster = EngineCluster(place, "apart")
    cluster.begin("p", "--no-http", "--role", "prefill")
    cluster.begin("d", "--no-http", "--role", "decode")
    return cluster


def loaded(ahead: Ahead, name: str) -> Iterator[Any]:
    """For a fixture: the cluster that was begun by this name, until its tests are over."""
    cluster: EngineCluster = ahead.begun(name)
    cluster.wait_ready()
    ahead.loaded(name)
    yield cluster
    for node in cluster.cluster.nodes:  # shown if a test has failed
        print(f"--- {' '.join(node.process.args[-12:])}\n{node.stderr[-20000:]}")  # type: ignore[index]
    cluster.cluster.stop()


def chat(client: openai.OpenAI, messages: list[dict[str, str]]) -> tuple[str, str, Any]:
    """(the worker, the answer, usage)."""
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=24,
        temperature=0,
    )
    assert answer.model_extra is not None
    return answer.model_extra["p2pdyn"]["workers"][0], answer.choices[0].message.content or "", answer.usage


def second_turns(cluster: EngineCluster, block: int) -> list[str]:
    """Four conversations of two turns; the worker of each. The second turn goes where the first is, and the engine says
    that it had that in its cache, of blocks of ``block`` tokens."""
    with cluster.client() as client:
        conversations = []
        for seed in range(4):
            messages = [{"role": "user", "content": prompt(LONG, seed)}]
            worker, content, usage = chat(client, messages)
            assert usage.completion_tokens <= 24
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": prompt(60, 100 + seed)}]
            conversations.append((worker, messages))
        for holder, messages in conversations:
            wait_for(lambda h=holder, m=messages: _choice(cluster, h, m, block), SEEN_S, "a choice, the holder known")
            told = cluster.explained(messages)
            second, _, usage = chat(client, messages)
            assert second == holder, f"the second turn goes to the worker that holds the first: {told}"
            assert usage.prompt_tokens_details.cached_tokens >= LONG - block
    return [worker for worker, _ in conversations]


def _choice(cluster: EngineCluster, holder: str, messages: list[dict[str, str]], block: int) -> bool:
    """Both workers can be chosen, and what ``holder`` holds is known: on a starved machine links come and go."""
    candidates = cluster.explained(messages)["candidates"]
    matched = {row["id"]: row["matched"] for row in candidates if row["state"] == "ready"}
    return len(matched) == 2 and matched.get(holder, 0) >= LONG // block
