"""Each field is honoured or refused with a 400 that names it; none is silently dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.endpoint import CHAT, Client, endpoint, run

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
TEXT = {"model": "sim", "prompt": "x"}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT_PATH, {"max_tokens": -1}, "max_tokens"),
    (CHAT_PATH, {"max_tokens": 0}, "max_tokens"),
    (CHAT_PATH, {"max_tokens": 1.5}, "max_tokens"),
    (CHAT_PATH, {"max_tokens": True}, "max_tokens"),
    (CHAT_PATH, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    (CHAT_PATH, {"max_tokens": 40_000}, "messages"),
    (CHAT_PATH, {"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    (CHAT_PATH, {"temperature": 9}, "temperature"),
    (CHAT_PATH, {"temperature": "0"}, "temperature"),
    (CHAT_PATH, {"top_p": 0}, "top_p"),
    (CHAT_PATH, {"n": 1000}, "n"),
    (CHAT_PATH, {"stop": [""]}, "stop[0]"),
    (CHAT_PATH, {"stop": ["x"] * 17}, "stop"),
    (CHAT_PATH, {"stream": "yes"}, "stream"),
    (CHAT_PATH, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT_PATH, {"stream": True, "stream_options": {"extra": 1}}, "stream_options.extra"),
    (CHAT_PATH, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT_PATH, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT_PATH, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT_PATH, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT_PATH, {"logit_bias": {"1": 5}}, "logit_bias"),
    (CHAT_PATH, {"store": True}, "store"),
    (CHAT_PATH, {"max_tokenz": 5}, "max_tokenz"),
    (CHAT_PATH, {"messages": []}, "messages"),
    (CHAT_PATH, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    (CHAT_PATH, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    (CHAT_PATH, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (TEXT_PATH, {"prompt": ""}, "prompt"),
    (TEXT_PATH, {"prompt": [1, "x"]}, "prompt"),
    (TEXT_PATH, {"prompt": [-1]}, "prompt"),
    (TEXT_PATH, {"prompt": [259]}, "prompt"),
    (TEXT_PATH, {"prompt": ["x"] * 200}, "prompt"),
    (TEXT_PATH, {"prompt": "x" * 40_000}, "prompt"),
    (TEXT_PATH, {"best_of": 3}, "best_of"),
    (TEXT_PATH, {"suffix": "end"}, "suffix"),
    (TEXT_PATH, {"echo": True, "logprobs": 1}, "echo"),
]


def test_what_cannot_be_honoured_is_400_and_names_the_field() -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            for path, change, param in REFUSED:
                answer = await client.post(path, {**(CHAT if path == CHAT_PATH else TEXT), **change})
                assert answer.status == 400, change
                assert answer.error["param"] == param, change
                assert answer.error["type"] == "invalid_request_error"
            assert not served.backend.jobs

    run(main())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"model":1}', b"{}", b"[" * 2000])
def test_a_body_that_is_no_request_is_400(body: bytes) -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            for path in (CHAT_PATH, TEXT_PATH):
                answer = await client.post(path, body)
                assert answer.status == 400
                assert answer.error

    run(main())


def test_everything_else_reaches_the_engine() -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            asked = {
                "min_tokens": 3, "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
                "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.3, "seed": -5,
                "stop_token_ids": [300], "ignore_eos": True, "cache_salt": "s", "priority": -2, "user": "me",
                "metadata": {"a": "b"}, "logit_bias": None, "tool_choice": "none",
            }  # fmt: skip
            headers = "x-p2pdyn-pin: 00aa\r\nx-p2pdyn-session: chat-1\r\nx-request-id: r-1\r\n"
            headers += f"traceparent: 00-{'a' * 32}-{'b' * 16}-01\r\n"
            answer = await client.post(CHAT_PATH, {**CHAT, **asked}, headers)
            assert answer.status == 200, answer.body
            assert (answer.headers["x-request-id"], answer.headers["x-p2pdyn-resumable"]) == ("r-1", "0")
            (job,) = served.backend.jobs
            assert (job.pin, job.session, job.request_id, job.resumable) == ("00aa", "chat-1", "r-1", False)
            assert job.traceparent.startswith("00-aaa")
            params = job.params
            assert params.max_tokens == 9
            assert params.seed == 2**63 - 5
            for name in ("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_salt"):
                assert getattr(params, name) == asked[name]
            assert (params.presence_penalty, params.frequency_penalty, params.priority) == (0.2, -0.3, -2)
            assert (params.stop_token_ids, params.ignore_eos) == ((300,), True)

    run(main())


def test_without_max_tokens_a_chat_has_the_rest_of_the_context_and_a_completion_16() -> None:
    async def main() -> None:
        async with endpoint("--speedup", "0", "--context", "100") as served, Client(served.port) as client:
            chat = (await client.post(CHAT_PATH, CHAT)).json()
            assert chat["usage"]["total_tokens"] == 100
            text = (await client.post(TEXT_PATH, TEXT)).json()
            assert text["usage"]["completion_tokens"] == 16
            exact = (await client.post(TEXT_PATH, {**TEXT, "max_tokens": 99})).json()
            assert exact["usage"]["total_tokens"] == 100
            over = await client.post(TEXT_PATH, {**TEXT, "max_tokens": 100})
            assert over.error["code"] == "context_length_exceeded"

    run(main())


def test_a_harmful_request_id_is_replaced() -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            answer = await client.get("/live", "x-request-id: a b<script>\r\n")
            assert answer.headers["x-request-id"].isalnum()
            assert json.loads(answer.body) == {"status": "live"}

    run(main())
