"""Real nodes with SGLang workers behind one endpoint, through the official client."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
import pytest
from support.ahead import Ahead, Place
from support.engine_cluster import EngineCluster, begun_apart, loaded, second_turns
from support.nodes import NodeProcess, wait_for
from support.pd import prompt
from support.sglang_engine import needs_sglang

pytestmark = [needs_sglang, pytest.mark.timeout(700)]

BLOCK = 16
"""Tokens of a KV block."""
FREED_S = 15.0
"""A client that left holds no blocks after this long, blocks that a dead worker may still write into included."""


def begun_pool(place: Place) -> EngineCluster:
    cluster = EngineCluster(place, "pool")
    for name in ("w1", "w2"):
        cluster.begin(name, "--no-http")
    return cluster


AHEAD = {"pool": begun_pool, "apart": begun_apart}


@pytest.fixture(scope="module")
def pool(ahead: Ahead) -> Iterator[EngineCluster]:
    """Two workers that do all."""
    yield from loaded(ahead, "pool")


def test_peers_show_engine_and_version(pool: EngineCluster) -> None:
    shown = [peer for peer in pool.frontend.peers(pool.cluster.key)["peers"] if peer["role"] != "frontend"]
    assert [(peer["engine"], peer["engine_version"]) for peer in shown] == [("sglang", version("sglang"))] * 2


def test_conversations_stay_where_their_prefix_is(pool: EngineCluster) -> None:
    """SGLang's own count of cached tokens confirms the hits."""
    second_turns(pool, BLOCK)


@pytest.mark.parametrize(
    "asked",
    [{"seed": 7, "temperature": 1.0}, {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}],
    ids=["seed", "form"],
)
def test_what_sglang_lacks_is_a_400_and_what_it_has_is_not(pool: EngineCluster, asked: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pool.client() as client:
        if "seed" in asked:
            with pytest.raises(openai.BadRequestError, match="seed is not supported"):
                client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, **asked)  # type: ignore
        else:
            schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
            form = {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}},
            }
            answer = client.chat.completions.create(
                model="tiny",
                messages=messages,
                max_tokens=100,
                response_format=form,  # type: ignore
            )
            assert json.loads(answer.choices[0].message.content or "") == {"a": 1}


def test_what_the_engine_refuses_is_a_400_with_its_sentence(pool: EngineCluster) -> None:
    """A schema that no frontend looks into."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
    with pool.client() as client, pytest.raises(openai.BadRequestError, match="nonsense"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=4,
            response_format=form,  # type: ignore
        )


class Stream:
    """One completion that streams in a thread."""

    def __init__(self, cluster: EngineCluster, prompt: str, tokens: int) -> None:
        self.text = ""
        self.workers: list[str] = []
        self.error: Exception | None = None
        self._cluster, self._prompt, self._tokens = cluster, prompt, tokens
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._cluster.client() as client:
                for chunk in client.completions.create(
                    model="tiny",
                    prompt=self._prompt,
                    max_tokens=self._tokens,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                ):
                    if chunk.choices:
                        self.text += chunk.choices[0].text
                    told = (chunk.model_extra or {}).get("p2pdyn")
                    self.workers = told["workers"] if told else self.workers
        except Exception as error:
            self.error = error


def complete(cluster: EngineCluster, prompt: str, tokens: int) -> str:
    stream = Stream(cluster, prompt, tokens)
    stream.thread.join(120)
    assert stream.error is None, stream.error
    return stream.text


def scheduler_of(node: NodeProcess) -> int:
    """SGLang's scheduler in this node: where it computes."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and "sglang::scheduler" in _read(entry / "cmdline"):
            parent = int(_read(entry / "stat").rpartition(")")[2].split()[1])
            host = int(_read(Path(f"/proc/{parent}/stat")).rpartition(")")[2].split()[1])
            if host == node.process.pid:
                found.append(int(entry.name))
    (pid,) = found
    return pid


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def test_an_engine_that_is_killed_is_named_and_its_streams_go_on(pool: EngineCluster) -> None:
    """The last one of the pool: the node leaves with the reason, the other one has both streams."""
    texts = [prompt(200, 31), prompt(200, 32)]
    expected = [complete(pool, text, 60) for text in texts]
    streams = [Stream(pool, text, 60) for text in texts * 2]
    wait_for(lambda: all(len(stream.text) > 3 for stream in streams), 60, "streams under way")
    victim = pool.named(pool.ready()[0]["id"])
    os.kill(scheduler_of(victim), signal.SIGKILL)
    for stream in streams:
        stream.thread.join(120)
    assert [stream.error for stream in streams] == [None] * 4
    assert [stream.text for stream in streams] == expected * 2
    wait_for(lambda: victim.process.poll() is not None, 20, "the node of the dead engine ends")
    assert victim.process.returncode == 1
    assert "SGLang's process" in victim.stderr
    wait_for(lambda: not any(pool.used()), FREED_S, "nothing is left on the other one")


# ---- prefill and decode


@pytest.fixture(scope="module")
def apart(ahead: Ahead) -> Iterator[EngineCluster]:
    """One prefill and one decode worker."""
    yield from loaded(ahead, "apart")


def test_prompts_are_computed_by_the_prefill_worker(apart: EngineCluster) -> None:
    """All of them, for the decode worker's engine computes none; the same again from the prefill worker's cache."""
    with apart.client() as client:
        for length in (5, 700, 1500):
            asked: dict[str, Any] = {
                "model": "tiny",
                "prompt": prompt(length, length),
                "max_tokens": 24,
                "temperature": 0,
            }
            first, again = (client.completions.create(**asked, extra_body={"ignore_eos": True}) for _ in range(2))
            assert first.choices[0].text == again.choices[0].text
            assert again.usage is not None
            assert again.usage.completion_tokens == 24
            details = again.usage.prompt_tokens_details
            assert details is not None
            assert (details.cached_tokens or 0) >= length - 16
    wait_for(lambda: apart.used() == [0, 0], FREED_S, lambda: f"blocks given back on both sides: {apart.used()}")


def test_moving_the_blocks_is_not_thought_to_take_as_long_as_computing_them(apart: EngineCluster) -> None:
    """SGLang's two sides begin together, so that a decode worker waits for both. Thought of an idle pair: the computing
    once, which here is also what a decode worker is thought to take, and a little."""
    told: dict[str, Any] = apart.explained([{"role": "user", "content": prompt(3500, 79)}])["prefill"]
    assert told["local_s"] > 0.05, f"of 3500 tokens, at the speed measured: {told}"
    assert told["remote_s"] < 1.2 * told["local_s"], told


def test_a_client_that_leaves_holds_no_blocks(apart: EngineCluster) -> None:
    """Before the first token, wherever the request is by then, and after it."""
    for seed, tokens in enumerate((0, 0, 1, 4), 50):
        with apart.client() as client:
            stream = client.completions.create(
                model="tiny", prompt=prompt(3000, seed), max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(tokens):
                next(stream)
            stream.close()
        wait_for(lambda: apart.used() == [0, 0], FREED_S, lambda: f"a client that left has blocks: {apart.used()}")
    assert [worker.process.poll() for worker in apart.workers] == [None, None], "no worker has ended by that"


def test_a_prefill_worker_that_dies_after_answering_costs_an_error_and_no_stream(apart: EngineCluster) -> None:
    """The last one. What decodes goes on; a prompt that nobody can compute any more is a clean error, soon."""
    text = prompt(300, 77)
    expected = complete(apart, text, 200)
    stream = Stream(apart, text, 200)
    wait_for(lambda: len(stream.text) > 3, 60, "a stream under way")
    (prefill,) = [apart.named(peer["id"]) for peer in apart.ready() if peer["role"] == "prefill"]
    scheduler = scheduler_of(prefill)
    os.kill(scheduler, signal.SIGSTOP)  # its host goes on, and answers with a room at once
    late = Stream(apart, prompt(700, 78), 4)
    wait_for(lambda: any(peer["load"]["queued"] for peer in apart.ready()), 20, "the decode side waits in the room")
    os.kill(scheduler, signal.SIGKILL)
    for one in (late, stream):
        one.thread.join(90)
    assert (stream.error, stream.text) == (None, expected)
    assert isinstance(late.error, openai.APIError)
    assert late.text == ""
    wait_for(lambda: prefill.process.poll() is not None, 20, "the node of the dead engine ends")
    wait_for(lambda: len(apart.ready()) == 1, 20, "the endpoint knows")
    with apart.client() as client, pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model="tiny", prompt=text, max_tokens=4)
    assert refused.value.status_code == 503
    wait_for(lambda: apart.used() == [0], FREED_S, lambda: f"blocks of the decode worker: {apart.used()}")
