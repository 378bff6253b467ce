"""Workers and frontends are killed, frozen and hung under streams: each answer is that of an undisturbed cluster."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from support import odd_node
from support.nodes import Cluster, NodeProcess, make_key, wait_for
from support.odd_engine import POISON_TOKENS
from support.pd import Asked, PdCluster, prompt

TOKENS = 80
ORPHANED_S = 5.0
ODD = Path(odd_node.__file__)
SLOW = ("--", "--itl-ms", "20")
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 5},
    "two": {"temperature": 0.9, "seed": 6, "n": 2},
    "logprobs": {"temperature": 0, "logprobs": 2},
    "stopped": {"temperature": 0, "stop": ["\0"]},
    "cut": {"temperature": 0, "min_tokens": TOKENS - 4, "ignore_eos": False},
}
UNSURE = {"presence_penalty": 0.5, "temperature": 0}
"""Cannot be continued by another worker."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, make_key(tmp_path)) as nodes:
        yield nodes


@dataclass
class Answer:
    """``said`` is what faults must not change."""

    said: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    worker: str = ""
    resumable: str = ""
    silence: float = 0.0
    error: Exception | None = None
    begun: threading.Event = field(default_factory=threading.Event)


def client(frontend: NodeProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", timeout=40, max_retries=0)


def ask(frontend: NodeProcess, prompt: str, more: dict[str, Any], stream: bool, answer: Answer) -> Answer:
    known = {name: more[name] for name in more if name not in ("ignore_eos", "min_tokens")}
    extra = {"ignore_eos": True, **{name: more[name] for name in more if name not in known}}
    known = {"max_tokens": TOKENS, **known}
    try:
        with client(frontend) as one:
            (_stream if stream else _whole)(one, {"model": "sim", "prompt": prompt, **known}, extra, answer)
    except openai.APIError as error:
        answer.error = error
    answer.begun.set()
    return answer


def _whole(one: openai.OpenAI, body: dict[str, Any], extra: dict[str, Any], answer: Answer) -> None:
    done = one.completions.create(**body, extra_body=extra)
    said = [(c.text, c.finish_reason, c.logprobs and c.logprobs.token_logprobs) for c in done.choices]
    answer.said, answer.facts = (said, _counts(done.usage)), done.model_extra["p2pdyn"]


def _stream(one: openai.OpenAI, body: dict[str, Any], extra: dict[str, Any], answer: Answer) -> None:
    parts: dict[int, tuple[str, str | None, list[Any]]] = {}
    usage, heard = None, 0.0
    stream = one.completions.create(**body, stream=True, stream_options={"include_usage": True}, extra_body=extra)
    answer.worker = stream.response.headers["x-p2pdyn-worker"]
    answer.resumable = stream.response.headers["x-p2pdyn-resumable"]
    for chunk in stream:
        now = time.monotonic()
        answer.silence, heard = max(answer.silence, now - (heard or now)), now
        answer.begun.set()
        usage = chunk.usage or usage
        answer.facts = chunk.model_extra.get("p2pdyn") or answer.facts
        for choice in chunk.choices:
            text, finish, logprobs = parts.get(choice.index, ("", None, []))
            logprobs = logprobs + list(choice.logprobs.token_logprobs if choice.logprobs else [])
            parts[choice.index] = (text + choice.text, choice.finish_reason or finish, logprobs)
    said = [(text, finish, logprobs or None) for _, (text, finish, logprobs) in sorted(parts.items())]
    answer.said = (said, _counts(usage))


def _counts(usage: Any) -> tuple[int, ...]:
    cached = usage.prompt_tokens_details.cached_tokens
    assert 0 <= cached <= usage.prompt_tokens
    return (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)


def all_kinds(frontend: NodeProcess, meanwhile: Callable[[list[Answer]], None] | None = None) -> list[Answer]:
    """Each kind, streamed and not, at once; ``meanwhile`` runs when all streams have begun."""
    asked = [(more, stream) for more in KINDS.values() for stream in (True, False)]
    answers = [Answer() for _ in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        for number, ((more, stream), answer) in enumerate(zip(asked, answers, strict=True)):
            pool.submit(ask, frontend, f"question {number // 2}", more, stream, answer)
        if meanwhile is not None:
            for (_, stream), answer in zip(asked, answers, strict=True):
                assert not stream or answer.begun.wait(20)
            meanwhile(answers)
    assert [answer.error for answer in answers if answer.error] == []
    return answers


def links_up(frontend: NodeProcess, cluster: Cluster) -> set[str]:
    peers = frontend.peers(cluster.key)["peers"]
    return {peer["id"] for peer in peers if peer["state"] == "ready" and peer["role"] != "frontend"}


def load_of(node: NodeProcess, cluster: Cluster) -> dict[str, Any]:
    """As the worker says itself."""
    found = next(peer["load"] for peer in node.peers(cluster.key)["peers"] if peer["id"] == node.id)
    assert isinstance(found, dict)
    return found


def idle(node: NodeProcess, cluster: Cluster) -> bool:
    load = load_of(node, cluster)
    return not (load["active_requests"] or load["queued"] or load["active_blocks"])


class Three:
    """A frontend and three workers, and what they answer undisturbed. Tests use them up, in the order of this file."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.frontend = cluster.frontend("f1", "--router", "round-robin")
        started = [cluster.start(f"w{i}", "--no-http", *SLOW, seeds=[self.frontend]) for i in (1, 2, 3)]
        self.workers = {worker.wait_ready().id: worker for worker in started}
        wait_for(lambda: links_up(self.frontend, cluster) == set(self.workers), 15, "all workers")
        answers = all_kinds(self.frontend)
        assert all(answer.facts["migrations"] == 0 for answer in answers)
        self.said = [answer.said for answer in answers]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    folder = tmp_path_factory.mktemp("three")
    with Cluster(folder, make_key(folder)) as nodes:
        yield Three(nodes)


@pytest.mark.alone
def test_a_frontend_that_stood_still_blames_nobody(three: Three) -> None:
    def stand(seconds: float) -> list[Answer]:
        def freeze(answers: list[Answer]) -> None:
            three.frontend.signal(signal.SIGSTOP)
            time.sleep(seconds)
            three.frontend.signal(signal.SIGCONT)

        met = all_kinds(three.frontend, freeze)
        assert [answer.said for answer in met] == three.said
        return met

    met = stand(1.6)  # longer than the silence of a worker that has streams
    assert [answer.facts["migrations"] for answer in met] == [0] * len(met)
    met = stand(6.0)  # its workers have given it up
    assert all(answer.facts["migrations"] <= len(answer.said[0]) for answer in met)
    links = lambda: links_up(three.frontend, three.cluster)  # noqa: E731
    wait_for(lambda: links() == set(three.workers), 10, "all workers are still members")


@pytest.mark.alone
def test_killed_and_frozen_workers_change_no_answer(three: Three) -> None:
    frozen: list[NodeProcess] = []

    def freeze(answers: list[Answer]) -> None:
        frozen.append(three.workers[answers[0].worker])
        frozen[0].signal(signal.SIGSTOP)
        time.sleep(2.5)  # its streams are elsewhere; those have a second to go
        frozen[0].signal(signal.SIGCONT)

    met = all_kinds(three.frontend, freeze)
    assert [answer.said for answer in met] == three.said
    moved = [answer for answer in met if answer.facts["migrations"]]
    assert moved
    assert all(frozen[0].id in answer.facts["workers"] for answer in moved)
    assert max(answer.silence for answer in met) < 3.0
    wait_for(lambda: idle(frozen[0], three.cluster), 5, "nothing is left on the worker that was frozen", every=0.1)

    met = all_kinds(three.frontend, lambda answers: three.workers[answers[2].worker].kill())
    assert [answer.said for answer in met] == three.said
    assert any(answer.facts["migrations"] for answer in met)


@pytest.mark.alone
def test_what_cannot_be_resumed_says_so_and_ends_with_an_event(three: Three) -> None:
    answer = Answer()
    asking = threading.Thread(target=ask, args=(three.frontend, "unsure", UNSURE, True, answer))
    asking.start()
    try:
        assert answer.begun.wait(20)
        three.workers[answer.worker].kill()
    finally:
        asking.join()
    assert answer.resumable == "0"
    assert isinstance(answer.error, openai.APIError)
    assert answer.error.code == "worker_lost"
    again = ask(three.frontend, "unsure", UNSURE, False, Answer())
    assert (again.error, again.facts["migrations"]) == (None, 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_of_a_frontend_that_is_gone_are_cancelled_and_clients_go_on_at_another(
    cluster: Cluster, number: signal.Signals
) -> None:
    first = cluster.frontend("f1")
    second = cluster.frontend("f2", seeds=[first])
    worker = cluster.worker("w1", *SLOW, seeds=[first])
    for frontend in (first, second):
        wait_for(lambda f=frontend: links_up(f, cluster) == {worker.id}, 15, "the worker")  # type: ignore[misc]
    answer = Answer()
    asking = threading.Thread(target=ask, args=(first, "long", {"max_tokens": 2000, "temperature": 0}, True, answer))
    asking.start()
    try:
        assert answer.begun.wait(20)
        first.signal(number)
        gone = time.monotonic()
        wait_for(lambda: idle(worker, cluster), ORPHANED_S + 3, "its requests are cancelled", every=0.1)
        assert time.monotonic() - gone < ORPHANED_S + 1.0
        after = Answer()
        for frontend in (first, second):  # what a client with two base URLs does
            if number == signal.SIGKILL or frontend is second:
                after = ask(frontend, "again", {"temperature": 0}, True, Answer())
        assert (after.error, after.facts["workers"]) == (None, [worker.id])
    finally:
        first.kill()
        asking.join()
    assert answer.error is not None or answer.said is None or answer.said[1][1] < 2000


def test_a_frontend_that_is_killed_leaves_no_lease_and_no_transfer(cluster: Cluster, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    pd = PdCluster(cluster, "sim", "tcp")
    prefill, decode = pd.start("p", "prefill"), pd.start("d", "decode", hold=hold)
    pd.ready()
    (hold / "before").touch()  # its reads wait
    asked = Asked(pd, prompt(800, 1))
    try:
        pd.stage(decode, "reading")
        pd.frontend.kill()
        pd.all_given_back(prefill, decode)
    finally:
        asked.join()
    assert asked.error is not None


def odd(cluster: Cluster, name: str, seeds: list[NodeProcess], *before: str) -> NodeProcess:
    return cluster.start(name, "--no-http", *SLOW, seeds=seeds, program=(sys.executable, str(ODD), *before))


def test_an_engine_that_stands_still_is_left_and_taken_back(cluster: Cluster) -> None:
    frontend = cluster.frontend("f1", "--router", "round-robin")
    started = [odd(cluster, f"w{i}", [frontend], "child") for i in (1, 2)]
    workers = {worker.wait_ready().id: worker for worker in started}
    wait_for(lambda: links_up(frontend, cluster) == set(workers), 15, "both workers")
    undisturbed = ask(frontend, "hang", {"temperature": 0}, False, Answer())
    answer = Answer()
    asking = threading.Thread(target=ask, args=(frontend, "hang", {"temperature": 0}, True, answer))
    asking.start()
    try:
        assert answer.begun.wait(20)
        victim = workers[answer.worker]
        (engine,) = psutil.Process(victim.process.pid).children()
        engine.suspend()
    finally:
        asking.join()
    try:
        assert (answer.error, answer.said) == (None, undisturbed.said)
        assert answer.facts["workers"] == [victim.id, *(set(workers) - {victim.id})]
        wait_for(lambda: links_up(frontend, cluster) == set(workers) - {victim.id}, 5, "it is stalled")
    finally:
        engine.resume()
    wait_for(lambda: links_up(frontend, cluster) == set(workers), 10, "it steps again and is ready")
    wait_for(lambda: idle(victim, cluster), 5, "nothing is left there")
    said = {ask(frontend, "hang", {"temperature": 0}, False, Answer()).said[0][0][0] for _ in range(4)}
    assert said == {undisturbed.said[0][0][0]}


def test_a_request_that_kills_its_workers_ends_and_takes_nobody_along(cluster: Cluster) -> None:
    frontend = cluster.frontend("f1", "--router", "round-robin")
    workers = [odd(cluster, f"w{i}", [frontend]) for i in range(4)]
    for worker in workers:
        worker.wait_ready()
    wait_for(lambda: len(links_up(frontend, cluster)) == 4, 15, "all workers")
    body = {"temperature": 0, "max_tokens": 150}
    expected = [ask(frontend, f"innocent {i}", body, False, Answer()) for i in range(4)]
    innocents = [Answer() for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for number, answer in enumerate(innocents):
            pool.submit(ask, frontend, f"innocent {number % 4}", body, number % 4 != 3, answer)
        for answer in (answer for number, answer in enumerate(innocents) if number % 4 != 3):
            assert answer.begun.wait(20)
        poison = ask(frontend, "poison", {"temperature": 0, "max_tokens": POISON_TOKENS}, False, Answer())
    assert isinstance(poison.error, openai.InternalServerError)
    assert poison.error.code == "request_kills_workers"
    assert poison.error.response.headers["x-should-retry"] == "false"
    assert [answer.error for answer in innocents if answer.error] == []
    assert [answer.said for answer in innocents] == [expected[number % 4].said for number in range(16)]
    assert sum(worker.process.poll() is None for worker in workers) == 1
    assert ask(frontend, "innocent 0", body, False, Answer()).said == expected[0].said
