"""Real nodes with vLLM workers behind one endpoint, through the official client."""

from __future__ import annotations

import json
import random
import re
import string
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.ahead import Ahead, Place
from support.nodes import Cluster, NodeProcess, make_key, wait_for
from support.vllm_engine import ARGS, START_S, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(700)]

LAG_S = 0.1
"""Loading never holds up the peer's loop this long, beyond what it waits for a CPU."""
PROMPT = re.compile(r"prefix cache: (\d+) tokens asked, (\d+) found; from other workers: (\d+) asked, (\d+) brought")
LONG = 3000
"""Tokens of a first turn."""
FREED_S = 5.0
"""A client that left holds no blocks after this long."""
NEWS_S = 15.0
"""vLLM's own counters are logged each 10 s."""


class Starved:
    """For how long the main thread of a process was ready to run and had no CPU, as the kernel counts it."""

    def __init__(self, pid: int) -> None:
        self._file = Path(f"/proc/{pid}/schedstat")
        self._seen = [(time.monotonic(), 0.0)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="starved")
        self._thread.start()

    def worst(self, span: float) -> float:
        """Seconds of any ``span`` seconds."""
        worst, first = 0.0, 0
        for at, waited in self._seen:
            while self._seen[first + 1][0] < at - span:
                first += 1
            worst = max(worst, waited - self._seen[first][1])
        return worst

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            waited = int(self._file.read_text().split()[1]) / 1e9
            self._seen.append((time.monotonic(), waited))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Vllms:
    """A cluster of vLLM workers on one tiny model, and a frontend."""

    def __init__(self, cluster: Cluster, model: Path) -> None:
        self.cluster = cluster
        self.model = model
        self.frontend = cluster.frontend("f")
        self.workers: list[NodeProcess] = []
        self.starved: Starved | None = None
        """Of the first one, if that is watched."""

    def begin(self, name: str, *flags: str) -> NodeProcess:
        """One that is loading."""
        args = (*flags, "--model", str(self.model), "--offline", "--", *ARGS)
        worker = self.cluster.start(name, *args, engine="vllm", seeds=[self.frontend])
        self.workers.append(worker)
        return worker

    def wait_ready(self) -> None:
        for worker in self.workers:
            worker.wait_ready(START_S)
        wait_for(lambda: self._ready() == len(self.workers), 15, "all workers, seen by the endpoint")

    def _ready(self) -> int:
        return sum(peer["state"] == "ready" for peer in self.peers())

    def peers(self) -> list[dict[str, Any]]:
        """The workers, as the endpoint sees them."""
        with urllib.request.urlopen(f"{self.frontend.url}/p2p/peers", timeout=10) as page:
            return [peer for peer in json.load(page)["peers"] if peer["role"] != "frontend"]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.frontend.url}/v1", api_key="none", timeout=60, max_retries=0)

    def named(self, worker: str) -> NodeProcess:
        return next(one for one in self.workers if one.id == worker)


def counted(worker: NodeProcess) -> tuple[int, ...]:
    """(prompt tokens asked of vLLM's prefix cache, found, asked of its connector, brought), as vLLM counts them."""
    found = PROMPT.findall(worker.stderr)
    return tuple(map(int, found[-1])) if found else (0, 0, 0, 0)


def words(characters: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=characters))


def begun_two(place: Place) -> Vllms:
    vllms = empty(place, "two")
    watched = vllms.begin("w1", "--http", "127.0.0.1:0")
    vllms.starved = Starved(watched.process.pid)
    place.ends.callback(vllms.starved.close)
    vllms.begin("w2", "--no-http")
    return vllms


def begun_apart(place: Place) -> Vllms:
    vllms = empty(place, "apart")
    vllms.begin("p", "--no-http", "--role", "prefill")
    vllms.begin("d", "--no-http", "--role", "decode")
    return vllms


def empty(place: Place, name: str) -> Vllms:
    folder = place.folders.mktemp(name)
    return Vllms(place.ends.enter_context(Cluster(folder, make_key(folder))), place.model)


AHEAD = {"two": begun_two, "apart": begun_apart}


def loaded(ahead: Ahead, name: str) -> Iterator[Vllms]:
    vllms: Vllms = ahead.begun(name)
    vllms.wait_ready()
    ahead.loaded(name)
    yield vllms
    for node in vllms.cluster.nodes:  # shown if a test has failed
        print(f"--- {' '.join(node.process.args[-12:])}\n{node.stderr[-20000:]}")  # type: ignore[index]
    vllms.cluster.stop()


@pytest.fixture(scope="module")
def two(ahead: Ahead) -> Iterator[Vllms]:
    """Two workers that do all."""
    yield from loaded(ahead, "two")


@pytest.fixture(scope="module")
def apart(ahead: Ahead) -> Iterator[Vllms]:
    """One prefill and one decode worker."""
    yield from loaded(ahead, "apart")


def chat(client: openai.OpenAI, messages: list[dict[str, str]], **more: Any) -> tuple[str, str, Any]:
    """(the worker, the answer, usage)."""
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=24,
        temperature=0,
        **more,  # type: ignore[call-overload]
    )
    return answer.model_extra["p2pdyn"]["workers"][0], answer.choices[0].message.content, answer.usage


def test_loading_never_held_up_the_loop(two: Vllms) -> None:
    assert two.starved is not None
    with urllib.request.urlopen(f"{two.workers[0].url}/metrics", timeout=10) as page:
        (lag,) = re.findall(r"^p2pdyn_loop_lag_seconds (\S+)", page.read().decode(), re.MULTILINE)
    two.starved.close()
    assert float(lag) < LAG_S + two.starved.worst(float(lag))


def test_conversations_stay_where_their_prefix_is(two: Vllms) -> None:
    """vLLM's own counters confirm the hits."""
    with two.client() as client:
        conversations = []
        for seed in range(4):
            messages = [{"role": "user", "content": words(LONG, seed)}]
            worker, content, usage = chat(client, messages)
            assert usage.completion_tokens <= 24
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": words(60, 100 + seed)}]
            conversations.append((worker, messages))
        wait_for(lambda: known_blocks(two) >= 4 * (LONG // 32), 15, "what the workers hold, known to the endpoint")
        for worker, messages in conversations:
            wait_for(lambda w=worker, m=messages: choice(two, w, m), 15, "a choice between both, the holder known")
            told = explained(two, messages)
            second, _, usage = chat(client, messages)
            assert second == worker, f"the second turn goes to the worker that holds the first: {told}"
            assert usage.prompt_tokens_details.cached_tokens >= LONG - 32
        used = {worker for worker, _ in conversations}
        for worker in used:
            turns = sum(one == worker for one, _ in conversations)
            wait_for(
                lambda w=worker, n=turns: counted(two.named(w))[1] >= (LONG - 32) * n, NEWS_S, "vLLM's count of hits"
            )
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],  # type: ignore[arg-type]
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert sum(bool(chunk.choices) for chunk in stream) >= 2


def test_what_the_engine_refuses_is_a_400_with_its_sentence(two: Vllms) -> None:
    """A schema that no frontend looks into."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
    with two.client() as client, pytest.raises(openai.BadRequestError, match=r"nonsense|schema|grammar"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=4,
            response_format=form,  # type: ignore
        )


def explained(vllms: Vllms, messages: list[dict[str, str]]) -> dict[str, Any]:
    """Where this would go now, and why."""
    body = json.dumps({"model": "tiny", "messages": messages}).encode()
    asked = urllib.request.Request(f"{vllms.frontend.url}/p2p/explain", body, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=10) as page:
        told: dict[str, Any] = json.load(page)
    return told


def choice(vllms: Vllms, holder: str, messages: list[dict[str, str]]) -> bool:
    """Both workers can be chosen, and what ``holder`` holds is known: on a starved machine links come and go."""
    matched = {row["id"]: row["matched"] for row in explained(vllms, messages)["candidates"] if row["state"] == "ready"}
    return len(matched) == 2 and matched.get(holder, 0) >= LONG // 32


def known_blocks(vllms: Vllms) -> int:
    """Told by vLLM's own publishers, on streams that lack nothing."""
    streams = [peer["kv"] for peer in vllms.peers()]
    return sum(kv["blocks"] for kv in streams) if all(kv["stream"] == "EXACT" for kv in streams) else 0


def test_long_prompts_are_computed_by_the_prefill_worker(apart: Vllms) -> None:
    """The decode worker's vLLM gets the blocks from the other one's, and answers what it answers alone."""
    prefill, decode = apart.workers
    with apart.client() as client:
        for seed in range(3):
            asked: dict[str, Any] = {"model": "tiny", "prompt": words(1500, seed), "max_tokens": 24, "temperature": 0}
            pulled = client.completions.create(**asked, extra_body={"ignore_eos": True})
            own = client.completions.create(**asked, extra_body={"ignore_eos": True, "cache_salt": f"own{seed}"})
            assert pulled.choices[0].text == own.choices[0].text
            assert pulled.usage is not None
            assert pulled.usage.completion_tokens == 24
    # The first one at least: once its own speed is known, the decode worker may be the faster of the two.
    wait_for(lambda: counted(decode)[3] >= 1500, NEWS_S, lambda: f"blocks brought to {decode.id}: {counted(decode)}")
    roles = {peer["id"]: peer["role"] for peer in apart.peers()}
    assert (roles[prefill.id], roles[decode.id]) == ("prefill", "decode")
    wait_for(lambda: not any(kv_used(apart)), 20, "blocks given back on both sides")


def test_a_client_that_leaves_holds_no_blocks(apart: Vllms) -> None:
    """Before the first token, wherever the request is by then, and after it."""
    for seed, tokens in enumerate((0, 0, 1, 4), 50):
        with apart.client() as client:
            stream = client.completions.create(
                model="tiny", prompt=words(3000, seed), max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(tokens):
                next(stream)
            if not tokens:
                wait_for(lambda: any(used > 0 for used in kv_used(apart)), 10, "the prompt is being computed")
            stream.close()
        wait_for(lambda: not any(kv_used(apart)), FREED_S, lambda: f"a client that left has blocks: {kv_used(apart)}")
    assert [worker.process.poll() for worker in apart.workers] == [None, None], "no worker has ended by that"


def kv_used(vllms: Vllms) -> list[int]:
    """Of each worker; -1 where the endpoint does not know it at the moment."""
    used = [peer["load"]["kv_used"] for peer in vllms.peers()]
    return [-1 if one is None else one for one in used]
