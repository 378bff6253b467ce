"""Real nodes with vLLM workers behind one endpoint, through the official client."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.ahead import Ahead, Place
from support.engine_cluster import LONG, EngineCluster, begun_apart, loaded, second_turns
from support.nodes import NodeProcess, wait_for
from support.pd import prompt
from support.vllm_engine import needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(700)]

LAG_S = 0.1
"""Loading never holds up the peer's loop this long, beyond what it waits for a CPU."""
PROMPT = re.compile(r"prefix cache: (\d+) tokens asked, (\d+) found; from other workers: (\d+) asked, (\d+) brought")
BLOCK = 32
"""Tokens of a KV block."""
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


class Two(EngineCluster):
    """Two workers that do all; of the first one is known for how long it was starved."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, "two")
        watched = self.begin("w1", "--http", "127.0.0.1:0")
        self.starved = Starved(watched.process.pid)
        place.ends.callback(self.starved.close)
        self.begin("w2", "--no-http")


AHEAD = {"two": Two, "apart": begun_apart}


@pytest.fixture(scope="module")
def two(ahead: Ahead) -> Iterator[Two]:
    yield from loaded(ahead, "two")


@pytest.fixture(scope="module")
def apart(ahead: Ahead) -> Iterator[EngineCluster]:
    """One prefill and one decode worker."""
    yield from loaded(ahead, "apart")


def counted(worker: NodeProcess) -> tuple[int, ...]:
    """(prompt tokens asked of vLLM's prefix cache, found, asked of its connector, brought), as vLLM counts them."""
    found = PROMPT.findall(worker.stderr)
    return tuple(map(int, found[-1])) if found else (0, 0, 0, 0)


def test_loading_never_held_up_the_loop(two: Two) -> None:
    with urllib.request.urlopen(f"{two.workers[0].url}/metrics", timeout=10) as page:
        (lag,) = re.findall(r"^p2pdyn_loop_lag_seconds (\S+)", page.read().decode(), re.MULTILINE)
    two.starved.close()
    assert float(lag) < LAG_S + two.starved.worst(float(lag))


def test_conversations_stay_where_their_prefix_is(two: Two) -> None:
    """vLLM's own counters confirm the hits."""
    used = Counter(second_turns(two, BLOCK))
    for worker, turns in used.items():
        hits = (LONG - BLOCK) * turns
        wait_for(lambda w=worker, n=hits: counted(two.named(w))[1] >= n, NEWS_S, "vLLM's count of hits")
    wait_for(lambda: known_blocks(two) >= 4 * (LONG // BLOCK), 15, "what the workers hold, known to the endpoint")


def test_a_stream_comes_in_parts(two: Two) -> None:
    with two.client() as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],  # type: ignore[arg-type]
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert sum(bool(chunk.choices) for chunk in stream) >= 2


def test_what_the_engine_refuses_is_a_400_with_its_sentence(two: Two) -> None:
    """A schema that no frontend looks into."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
    with two.client() as client, pytest.raises(openai.BadRequestError, match=r"nonsense|schema|grammar"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=4,
            response_format=form,  # type: ignore
        )


def known_blocks(cluster: EngineCluster) -> int:
    """Told by vLLM's own publishers, on streams that lack nothing."""
    streams = [peer["kv"] for peer in cluster.peers()]
    return sum(kv["blocks"] for kv in streams) if all(kv["stream"] == "EXACT" for kv in streams) else 0


def test_long_prompts_are_computed_by_the_prefill_worker(apart: EngineCluster) -> None:
    """The decode worker's vLLM gets the blocks from the other one's, and answers what it answers alone."""
    prefill, decode = apart.workers
    with apart.client() as client:
        for seed in range(3):
            asked: dict[str, Any] = {"model": "tiny", "prompt": prompt(1500, seed), "max_tokens": 24, "temperature": 0}
            pulled = client.completions.create(**asked, extra_body={"ignore_eos": True})
            own = client.completions.create(**asked, extra_body={"ignore_eos": True, "cache_salt": f"own{seed}"})
            assert pulled.choices[0].text == own.choices[0].text
            assert pulled.usage is not None
            assert pulled.usage.completion_tokens == 24
    # The first one at least: once its own speed is known, the decode worker may be the faster of the two.
    wait_for(lambda: counted(decode)[3] >= 1500, NEWS_S, lambda: f"blocks brought to {decode.id}: {counted(decode)}")
    roles = {peer["id"]: peer["role"] for peer in apart.peers()}
    assert (roles[prefill.id], roles[decode.id]) == ("prefill", "decode")
    wait_for(lambda: apart.used() == [0, 0], 20, "blocks given back on both sides")


def test_a_client_that_leaves_holds_no_blocks(apart: EngineCluster) -> None:
    """Before the first token, wherever the request is by then, and after it."""
    for seed, tokens in enumerate((0, 0, 1, 4), 50):
        with apart.client() as client:
            stream = client.completions.create(
                model="tiny", prompt=prompt(3000, seed), max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(tokens):
                next(stream)
            if not tokens:
                wait_for(lambda: any(used > 0 for used in apart.used()), 10, "the prompt is being computed")
            stream.close()
        wait_for(lambda: apart.used() == [0, 0], FREED_S, lambda: f"a client that left has blocks: {apart.used()}")
    assert [worker.process.poll() for worker in apart.workers] == [None, None], "no worker has ended by that"
