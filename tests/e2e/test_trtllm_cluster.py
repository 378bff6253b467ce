"""Real nodes with the double of TensorRT-LLM as their engine, prefill and decode apart, through the official client."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support import handing_frontend, trtllm_package
from support.engines import text
from support.nodes import Cluster, NodeProcess, make_key, wait_for
from support.pd import prompt
from support.trtllm_subject import ARGS

from p2pdyn.engines.base import EngineOptions
from p2pdyn.engines.sim import SimEngine
from p2pdyn.engines.sim_args import SimArgs

NEW_TOKENS = 24
PROMPTS = [prompt(300, seed) for seed in range(4)]


class Trtllms:
    def __init__(self, cluster: Cluster, model: Path) -> None:
        self.cluster = cluster
        program = (sys.executable, handing_frontend.__file__)
        self.frontend = cluster.start("f", "--http", "127.0.0.1:0", engine="none", program=program).wait_ready()
        self.prefill, self.decode = (self._start(name, model) for name in ("prefill", "decode"))
        for worker in (self.prefill, self.decode):
            worker.wait_ready(40)
        wait_for(lambda: len(self.workers()) == 2 and all(w["state"] == "ready" for w in self.workers()), 15, "both")

    def _start(self, role: str, model: Path) -> NodeProcess:
        flags = ("--no-http", "--role", role, "--model", str(model), "--served-model-name", "bytes", "--", *ARGS)
        return self.cluster.start(role, *flags, engine="trtllm", seeds=[self.frontend])

    def workers(self) -> list[dict[str, Any]]:
        peers = self.frontend.peers(self.cluster.key)["peers"]
        return [peer for peer in peers if peer["engine"] == "trtllm"]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.frontend.url}/v1", api_key="none", timeout=30, max_retries=0)

    def exact(self) -> int:
        """Blocks that the endpoint knows of, on streams that lack nothing."""
        streams = [worker["kv"] for worker in self.workers()]
        return sum(kv["blocks"] for kv in streams) if all(kv["stream"] == "EXACT" for kv in streams) else 0

    def used(self) -> int:
        return sum(worker["load"]["kv_used"] or 0 for worker in self.workers())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trtllm")


@pytest.fixture(scope="module")
def trtllms(folder: Path) -> Iterator[Trtllms]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in trtllm_package.environment(folder, trtllm_package.NEWEST, itl_ms=3.0).items():
            patch.setenv(name, value)
        with Cluster(folder, make_key(folder)) as nodes:
            yield Trtllms(nodes, trtllm_package.model(folder / "bytes"))


def ask(client: openai.OpenAI, words: str, **more: Any) -> Any:
    asked = {"model": "bytes", "prompt": words, "max_tokens": NEW_TOKENS, "temperature": 0, **more}
    return client.completions.create(**asked)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[str], str]:
    """What the double's engine answers alone."""
    engine = SimEngine(EngineOptions(str(trtllm_package.model(folder / "alone"))), SimArgs(speedup=0.0))
    engine.load(lambda fraction, what: None)
    return lambda prompt: bytes(text(engine, list(prompt.encode()), max_tokens=NEW_TOKENS)).decode()


def test_handed_over_the_answers_are_those_of_one_engine(
    trtllms: Trtllms, folder: Path, expected: Callable[[str], str]
) -> None:
    """Every prompt is handed over, and the tokens are a function of the KV bytes that arrived."""
    with trtllms.client() as client:
        for words in PROMPTS:
            handed = ask(client, words, logprobs=2)
            assert handed.choices[0].text == expected(words)
            assert len(handed.choices[0].logprobs.token_logprobs) == NEW_TOKENS
            assert handed.model_extra["p2pdyn"]["workers"][-1] == trtllms.decode.id
        pieces = [chunk.choices[0].text for chunk in ask(client, PROMPTS[0], stream=True) if chunk.choices]
        assert len(pieces) > NEW_TOKENS // 2
        assert "".join(pieces) == expected(PROMPTS[0])
    wait_for(lambda: trtllms.exact() >= 2 * 4 * (300 // 16), 15, "what both hold, known to the endpoint")
    wait_for(lambda: trtllms.used() == 0, 10, "nothing is held")
    assert trtllm_package.violations(folder) == []


def test_a_client_that_leaves_ends_its_request(trtllms: Trtllms, folder: Path) -> None:
    with trtllms.client() as client:
        for tokens in (0, 1, 4):
            stream = ask(client, prompt(500, 50 + tokens), max_tokens=400, stream=True)
            for _ in range(tokens):
                next(stream)
            stream.close()
        wait_for(lambda: trtllms.used() == 0, 15, "nothing is held")
    assert trtllm_package.violations(folder) == []


def test_what_no_worker_could_do_is_told_as_the_requests_fault(trtllms: Trtllms, folder: Path) -> None:
    """By the endpoint where the card says so, else by the engine that generates."""
    with trtllms.client() as client:
        with pytest.raises(openai.BadRequestError, match="seed"):
            ask(client, "x", temperature=1, seed=3)  # which no version that was read honours
        with pytest.raises(openai.BadRequestError, match="at most one stop token"):
            ask(client, PROMPTS[0], extra_body={"min_tokens": 3, "stop_token_ids": [300, 301]})
    assert trtllm_package.violations(folder) == []


def test_peers_say_what_runs_and_a_dead_prefill_worker_costs_no_answer(
    trtllms: Trtllms, folder: Path, expected: Callable[[str], str]
) -> None:
    assert {worker["engine_version"] for worker in trtllms.workers()} == {trtllm_package.NEWEST}
    with trtllms.client() as client:
        trtllms.prefill.signal(signal.SIGKILL)
        for seed in (90, 91):
            words = prompt(300, seed)
            assert ask(client, words).choices[0].text == expected(words)
    assert trtllm_package.violations(folder) == []
