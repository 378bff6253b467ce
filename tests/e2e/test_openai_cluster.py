"""The official client against a running cluster, through the endpoints of two different peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.nodes import Cluster, NodeProcess, make_key, wait_for

KEY = "sk-right"
USER = [{"role": "user", "content": "What holds the answer?"}]


@pytest.fixture(scope="module")
def frontends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NodeProcess]]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "keys").write_text(f"{KEY}\n")
    with Cluster(folder, make_key(folder)) as cluster:
        first = cluster.frontend("f1", "--api-key-file", str(folder / "keys"))
        second = cluster.frontend("f2", "--api-key-file", str(folder / "keys"), seeds=[first])
        for name in ("w1", "w2"):
            cluster.worker(name, "--", "--speedup", "0", "--context", "2048", seeds=[first])
        for frontend in (first, second):
            wait_for(lambda f=frontend: _ready_workers(f) == 2, 15, "both workers, seen by both endpoints")
        yield [first, second]


@pytest.fixture(params=[0, 1], ids=["first", "second"])
def client(frontends: list[NodeProcess], request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    with connect(frontends[request.param]) as one:
        yield one


def connect(frontend: NodeProcess, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{frontend.url}/v1", api_key=key, timeout=20, max_retries=0)


def _ready_workers(frontend: NodeProcess) -> int:
    with connect(frontend) as one:
        return sum(model.model_extra["ready_workers"] for model in one.models.list().data)  # type: ignore[index]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="sim", messages=USER, max_tokens=20, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20


def test_streamed_chat_with_usage_says_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "sim", "messages": USER, "max_tokens": 20, "temperature": 0}
    warm = client.chat.completions.create(**asked)
    # On one worker that has the prompt in its cache, so that cached_tokens is the same too.
    asked["extra_headers"] = {"x-p2pdyn-pin": warm.model_extra["p2pdyn"]["workers"][0]}  # type: ignore[index]
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    texts = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert len(texts) == 20, "one event a token"
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].model_extra["p2pdyn"]["migrations"] == 0  # type: ignore[index]


def test_both_endpoints_give_the_same_answer(frontends: list[NodeProcess]) -> None:
    answers = []
    for frontend in frontends:
        with connect(frontend) as one:
            done = one.chat.completions.create(model="sim", messages=USER, max_tokens=40, temperature=0.8, seed=11)
            answers.append(done.choices[0].message.content)
    assert answers[0] == answers[1]


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="sim", prompt=["one", "two"], max_tokens=6, n=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["one", "one", "two", "two"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4 * 6
    from_ids = client.completions.create(model="sim", prompt=list(b"one"), max_tokens=6, temperature=0)
    from_text = client.completions.create(model="sim", prompt="one", max_tokens=6, temperature=0)
    assert from_ids.choices[0].text == from_text.choices[0].text


def test_stop_and_logprobs(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="sim", messages=USER, max_tokens=30, temperature=0, logprobs=True, top_logprobs=2
    )
    text = whole.choices[0].message.content or ""
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert "".join(entry.token for entry in whole.choices[0].logprobs.content) == text
    cut = client.chat.completions.create(model="sim", messages=USER, max_tokens=30, temperature=0, stop=text[10:13])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == text[: text.index(text[10:13])]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["sim"]
    assert client.models.retrieve("sim").id == "sim"


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"model": "none"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": -1}, openai.BadRequestError, None),
        ({"temperature": "hot"}, openai.BadRequestError, None),
        (
            {"messages": [{"role": "user", "content": "word " * 4000}]},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        ({"extra_body": {"unknown_field": 1}}, openai.BadRequestError, None),
    ],
)
def test_error_classes(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError], code: str | None
) -> None:
    asked: dict[str, Any] = {"model": "sim", "messages": USER, "max_tokens": 4, **change}
    with pytest.raises(error) as raised:
        client.chat.completions.create(**asked)
    body = raised.value.body
    assert isinstance(body, dict)
    assert body.keys() == {"message", "type", "param", "code"}
    assert code is None or body["code"] == code


def test_wrong_key(frontends: list[NodeProcess]) -> None:
    with connect(frontends[1], "sk-wrong") as one, pytest.raises(openai.AuthenticationError):
        one.models.list()
