"""Real nodes with SGLang workers behind one endpoint, through the official client."""

from __future__ import annotations

import json
import os
import random
import signal
import string
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from support.ahead import Ahead, Place
from support.nodes import Cluster, NodeProcess, make_key, wait_for
from support.sglang_engine import ARGS, START_S, needs_sglang

pytestmark = [needs_sglang, pytest.mark.timeout(700)]

LONG = 3000
"""Tokens of a first turn: letters, one each."""
FREED_S = 15.0
"""A client that left holds no blocks after this long, blocks that a dead worker may still write into included."""


class Sglangs:
    """A cluster of SGLang workers on one tiny model, and a frontend."""

    def __init__(self, cluster: Cluster, model: Path) -> None:
        self.cluster = cluster
        self.model = model
        self.frontend = cluster.frontend("f")
        self.workers: list[NodeProcess] = []

    def begin(self, **roles: str) -> None:
        """All load beside each other."""
        for name, role in roles.items():
            args = ("--no-http", "--model", str(self.model), "--offline", "--role", role, "--", *ARGS)
            self.workers.append(self.cluster.start(name, *args, engine="sglang", seeds=[self.frontend]))

    def wait_ready(self) -> None:
        """Until the endpoint knows them."""
        for worker in self.workers:
            worker.wait_ready(START_S)
        wait_for(lambda: len(self.ready()) == len(self.workers), 20, "all workers, seen by the endpoint")

    def alive(self) -> list[NodeProcess]:
        return [worker for worker in self.workers if worker.process.poll() is None]

    def peers(self) -> list[dict[str, Any]]:
        """The workers, as the endpoint sees them."""
        with urllib.request.urlopen(f"{self.frontend.url}/p2p/peers", timeout=10) as page:
            return [peer for peer in json.load(page)["peers"] if peer["role"] != "frontend"]

    def ready(self) -> list[dict[str, Any]]:
        return [peer for peer in self.peers() if peer["state"] == "ready"]

    def used(self) -> list[int]:
        """KV blocks of each worker that is ready; -1 where the endpoint does not know."""
        return [-1 if peer["load"]["kv_used"] is None else peer["load"]["kv_used"] for peer in self.ready()]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.frontend.url}/v1", api_key="none", timeout=90, max_retries=0)

    def named(self, worker: str) -> NodeProcess:
        return next(one for one in self.workers if one.id == worker)


def words(characters: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=characters))


def begun(place: Place, name: str, **roles: str) -> Sglangs:
    folder = place.folders.mktemp(name)
    nodes = place.ends.enter_context(Cluster(folder, make_key(folder)))
    sglangs = Sglangs(nodes, place.model)
    sglangs.begin(**roles)
    return sglangs


AHEAD = {
    "pool": partial(begun, name="pool", w1="aggregated", w2="aggregated"),
    "apart": partial(begun, name="apart", p="prefill", d="decode"),
}


def loaded(ahead: Ahead, name: str) -> Iterator[Sglangs]:
    sglangs: Sglangs = ahead.begun(name)
    sglangs.wait_ready()
    ahead.loaded(name)
    yield sglangs
    for node in sglangs.cluster.nodes:  # shown if a test has failed
        print(f"--- {' '.join(node.process.args[-12:])}\n{node.stderr[-12000:]}")  # type: ignore[index]
    sglangs.cluster.stop()


@pytest.fixture(scope="module")
def pool(ahead: Ahead) -> Iterator[Sglangs]:
    """Two workers that do all."""
    yield from loaded(ahead, "pool")


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


def explained(sglangs: Sglangs, messages: list[dict[str, str]]) -> dict[str, int]:
    """What each worker that can be chosen is known to hold of this, in blocks."""
    body = json.dumps({"model": "tiny", "messages": messages}).encode()
    asked = urllib.request.Request(f"{sglangs.frontend.url}/p2p/explain", body, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=10) as page:
        return {row["id"]: row["matched"] for row in json.load(page)["candidates"] if row["state"] == "ready"}


def test_peers_show_engine_and_version(pool: Sglangs) -> None:
    shown = [peer for peer in pool.frontend.peers(pool.cluster.key)["peers"] if peer["role"] != "frontend"]
    assert {peer["engine"] for peer in shown} == {"sglang"}


def test_conversations_stay_where_their_prefix_is(pool: Sglangs) -> None:
    """SGLang's own count of cached tokens confirms the hits."""
    with pool.client() as client:
        conversations = []
        for seed in range(4):
            messages = [{"role": "user", "content": words(LONG, seed)}]
            worker, content, usage = chat(client, messages)
            assert usage.completion_tokens <= 24
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": words(60, 100 + seed)}]
            conversations.append((worker, messages))
        for worker, messages in conversations:

            def choice(holder: str = worker, asked: list[dict[str, str]] = messages) -> bool:
                matched = explained(pool, asked)
                return len(matched) == 2 and matched.get(holder, 0) >= LONG // 16

            wait_for(choice, 20, "a choice between both, the holder known")
            second, _, usage = chat(client, messages)
            assert second == worker, "the second turn goes to the worker that holds the first"
            assert usage.prompt_tokens_details.cached_tokens >= LONG - 16


@pytest.mark.parametrize(
    "asked",
    [{"seed": 7, "temperature": 1.0}, {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}],
    ids=["seed", "form"],
)
def test_what_sglang_lacks_is_a_400_and_what_it_has_is_not(pool: Sglangs, asked: dict[str, Any]) -> None:
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


def test_what_the_engine_refuses_is_a_400_with_its_sentence(pool: Sglangs) -> None:
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

    def __init__(self, sglangs: Sglangs, prompt: str, tokens: int) -> None:
        self.text = ""
        self.workers: list[str] = []
        self.error: Exception | None = None
        self._sglangs, self._prompt, self._tokens = sglangs, prompt, tokens
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._sglangs.client() as client:
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


def complete(sglangs: Sglangs, prompt: str, tokens: int) -> str:
    stream = Stream(sglangs, prompt, tokens)
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


def test_an_engine_that_is_killed_is_named_and_its_streams_go_on(pool: Sglangs) -> None:
    """The last one of the pool: the node leaves with the reason, the other one has both streams."""
    prompts = [words(200, 31), words(200, 32)]
    expected = [complete(pool, prompt, 60) for prompt in prompts]
    streams = [Stream(pool, prompt, 60) for prompt in prompts * 2]
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
def apart(ahead: Ahead) -> Iterator[Sglangs]:
    """One prefill and one decode worker."""
    yield from loaded(ahead, "apart")


def test_prompts_are_computed_by_the_prefill_worker(apart: Sglangs) -> None:
    """All of them, for the decode worker's engine computes none; the same again from the prefill worker's cache."""
    with apart.client() as client:
        for length in (5, 700, 1500):
            asked: dict[str, Any] = {
                "model": "tiny",
                "prompt": words(length, length),
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


def test_a_client_that_leaves_holds_no_blocks(apart: Sglangs) -> None:
    """Before the first token, wherever the request is by then, and after it."""
    for seed, tokens in enumerate((0, 0, 1, 4), 50):
        with apart.client() as client:
            stream = client.completions.create(
                model="tiny", prompt=words(3000, seed), max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(tokens):
                next(stream)
            stream.close()
        wait_for(lambda: apart.used() == [0, 0], FREED_S, lambda: f"a client that left has blocks: {apart.used()}")
    assert len(apart.alive()) == 2, "no worker has ended by that"


def test_a_prefill_worker_that_dies_after_answering_costs_an_error_and_no_stream(apart: Sglangs) -> None:
    """The last one. What decodes goes on; a prompt that nobody can compute any more is a clean error, soon."""
    prompt = words(300, 77)
    expected = complete(apart, prompt, 200)
    stream = Stream(apart, prompt, 200)
    wait_for(lambda: len(stream.text) > 3, 60, "a stream under way")
    (prefill,) = [apart.named(peer["id"]) for peer in apart.ready() if peer["role"] == "prefill"]
    scheduler = scheduler_of(prefill)
    os.kill(scheduler, signal.SIGSTOP)  # its host goes on, and answers with a room at once
    late = Stream(apart, words(700, 78), 4)
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
        client.completions.create(model="tiny", prompt=prompt, max_tokens=4)
    assert refused.value.status_code == 503
    wait_for(lambda: apart.used() == [0], FREED_S, lambda: f"blocks of the decode worker: {apart.used()}")
