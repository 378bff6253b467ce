"""The official client against the endpoint, with the real simulated engine behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from support.endpoint import CHAT, Endpoint, endpoint, run
from support.local_backend import WORKER

from p2pdyn.core.request import Failure


@asynccontextmanager
async def client(*engine_args: str, **settings: Any) -> AsyncIterator[tuple[openai.AsyncOpenAI, Endpoint]]:
    async with (
        endpoint(*engine_args, **settings) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="key-number-1", max_retries=0) as one,
    ):
        yield one, served


def test_models_are_listed_and_described() -> None:
    async def main() -> None:
        async with client() as (one, _):
            assert [model.id async for model in one.models.list()] == ["sim"]
            model = await one.models.retrieve("sim")
            assert (model.object, model.owned_by) == ("model", "p2pdyn")
            with pytest.raises(openai.NotFoundError) as caught:
                await one.models.retrieve("other/model")
            assert caught.value.code == "model_not_found"

    run(main())


def test_a_chat_streamed_and_whole_says_the_same_with_the_same_usage() -> None:
    async def main() -> None:
        async with client() as (one, _):
            whole = await one.chat.completions.create(**CHAT, max_tokens=40, temperature=0)
            stream = await one.chat.completions.create(
                **CHAT, max_tokens=40, temperature=0, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
            assert len(pieces) == 41  # one event a token, and the finish
            assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
            assert chunks[0].choices[0].delta.role == "assistant"
            assert chunks[-2].choices[0].finish_reason == "length" == whole.choices[0].finish_reason
            usage = chunks[-1].usage
            assert usage is not None
            assert whole.usage is not None
            assert usage.prompt_tokens == whole.usage.prompt_tokens
            assert usage.completion_tokens == whole.usage.completion_tokens == 40
            facts = {"workers": [WORKER], "migrations": 0}
            assert whole.model_extra is not None
            assert whole.model_extra["p2pdyn"] == facts == chunks[-1].model_extra["p2pdyn"]  # type: ignore[index]

    run(main())


def test_the_second_request_of_a_conversation_reports_cached_tokens() -> None:
    async def main() -> None:
        async with client() as (one, _):
            first = await one.chat.completions.create(**CHAT, max_tokens=40)
            again = await one.chat.completions.create(**CHAT, max_tokens=40)
            assert first.usage.prompt_tokens_details.cached_tokens == 0  # type: ignore[union-attr]
            assert again.usage.prompt_tokens_details.cached_tokens > 0  # type: ignore[union-attr]

    run(main())


def test_several_prompts_times_n_come_back_in_order_with_echo() -> None:
    async def main() -> None:
        async with client() as (one, _):
            prompts = ["alpha", "beta"]
            whole = await one.completions.create(model="sim", prompt=prompts, n=2, echo=True, max_tokens=5, seed=7)
            assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
            assert [choice.text[:4] for choice in whole.choices] == ["alph", "alph", "beta", "beta"]
            assert whole.choices[0].text != whole.choices[1].text  # each choice has its own seed
            assert whole.usage.prompt_tokens == 9  # type: ignore[union-attr]
            assert whole.usage.completion_tokens == 20  # type: ignore[union-attr]
            stream = await one.completions.create(
                model="sim", prompt=prompts, n=2, echo=True, max_tokens=5, seed=7, stream=True
            )
            texts = ["", "", "", ""]
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            assert texts == [choice.text for choice in whole.choices]

    run(main())


def test_token_ids_are_a_prompt_as_good_as_their_text() -> None:
    async def main() -> None:
        async with client() as (one, _):
            ids = list(b"hello")
            by_text = await one.completions.create(model="sim", prompt="hello", temperature=0)
            by_ids = await one.completions.create(model="sim", prompt=ids, temperature=0)
            both = await one.completions.create(model="sim", prompt=[ids, ids], temperature=0)
            assert by_text.choices[0].text == by_ids.choices[0].text == both.choices[1].text
            assert by_text.usage.completion_tokens == 16  # type: ignore[union-attr]

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_the_work_behind_it(stream: bool) -> None:
    async def main() -> None:
        async with client() as (one, served):
            free = await one.completions.create(model="sim", prompt="go", max_tokens=200, temperature=0)
            text = free.choices[0].text
            stop = text[50:54]
            at = text.find(stop)
            answer: Any = await one.completions.create(
                model="sim", prompt="go", max_tokens=20000, temperature=0, stop=[stop, "never"], stream=stream
            )
            if stream:
                choices = [chunk.choices[0] async for chunk in answer]
                assert "".join(choice.text for choice in choices) == text[:at]
                assert choices[-1].finish_reason == "stop"
            else:
                assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[:at], "stop")
                assert answer.usage.completion_tokens == at + 4
            assert len(served.backend.cancelled) == 1
            assert not served.backend.running

    run(main())


def test_logprobs_of_chat_and_completions() -> None:
    async def main() -> None:
        async with client() as (one, _):
            chat = await one.chat.completions.create(**CHAT, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0)
            entries = chat.choices[0].logprobs.content  # type: ignore[union-attr]
            assert "".join(entry.token for entry in entries) == chat.choices[0].message.content  # type: ignore[union-attr]
            for entry in entries or ():
                assert len(entry.top_logprobs) == 3
                assert entry.top_logprobs[0].logprob == entry.logprob  # greedy takes the likeliest
                assert bytes(entry.bytes or ()).decode() == entry.token
            stream = await one.chat.completions.create(
                **CHAT, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0, stream=True
            )
            streamed = [
                e
                for c in [c async for c in stream]
                if c.choices[0].logprobs
                for e in c.choices[0].logprobs.content or ()
            ]
            assert streamed == entries
            text = await one.completions.create(model="sim", prompt="x", max_tokens=4, logprobs=2, temperature=0)
            columns = text.choices[0].logprobs
            assert columns is not None
            assert columns.text_offset == [0, 1, 2, 3]
            assert "".join(columns.tokens or ()) == text.choices[0].text
            assert [len(top) for top in columns.top_logprobs or ()] == [2, 2, 2, 2]

    run(main())


def test_every_failure_is_the_clients_error_class() -> None:
    async def main() -> None:
        async with client() as (one, served):
            with pytest.raises(openai.BadRequestError) as bad:
                await one.chat.completions.create(**CHAT, max_tokens=-1)
            assert bad.value.param == "max_tokens"
            with pytest.raises(openai.NotFoundError) as missing:
                await one.chat.completions.create(model="nope", messages=CHAT["messages"])  # type: ignore[arg-type]
            assert missing.value.code == "model_not_found"
            served.backend.failure = Failure(429, "overloaded", "Too many.", 3)
            with pytest.raises(openai.RateLimitError) as many:
                await one.chat.completions.create(**CHAT)
            assert many.value.response.headers["retry-after"] == "3"
            served.backend.failure = Failure(503, "no_ready_worker", "None.")
            with pytest.raises(openai.InternalServerError) as none:
                await one.chat.completions.create(**CHAT)
            assert (none.value.status_code, none.value.response.headers["retry-after"]) == (503, "1")

    run(main())


def test_a_loss_after_the_first_token_is_an_error_event() -> None:
    async def main() -> None:
        async with client("--itl-ms", "5") as (one, served):
            stream = await one.chat.completions.create(**CHAT, stream=True, presence_penalty=0.5)
            assert stream.response.headers["x-p2pdyn-resumable"] == "0"
            assert stream.response.headers["x-p2pdyn-worker"] == WORKER
            await anext(stream)
            served.backend.lose(Failure(503, "worker_lost", "The worker is gone."))
            with pytest.raises(openai.APIError) as lost:
                async for _ in stream:
                    pass
            assert lost.value.code == "worker_lost"

    run(main())


def test_keys_are_wanted_except_for_health(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nkey-number-0\nkey-number-1\n")

    async def main() -> None:
        async with client(api_key_file=keys) as (one, served):
            assert [model.id async for model in one.models.list()] == ["sim"]
            keys.write_text("key-number-2\n")
            served.server.reload()
            with pytest.raises(openai.AuthenticationError) as caught:
                await one.models.list()
            assert caught.value.code == "invalid_api_key"
            again = one.with_options(api_key="key-number-2")
            assert [model.id async for model in again.models.list()] == ["sim"]

    run(main())
