"""The generation routes: from the body's bytes to submitted jobs.

All of it happens at once, out of the connection, when the model's tokenizer is loaded and the text is not long; only
otherwise there is a task that waits.
"""

from __future__ import annotations

import asyncio
import random
import re
from array import array
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from p2pdyn.core.request import Job
from p2pdyn.http.backend import Backend
from p2pdyn.http.errors import bad
from p2pdyn.http.exchange import Exchange
from p2pdyn.http.formats import ChatFormat, CompletionFormat, Shape
from p2pdyn.http.metrics import HttpMetrics
from p2pdyn.http.openai import COMPLETION_TOKENS, SEED_MASK, Ask, chat_ask, completion_ask, parse
from p2pdyn.http.reply import Pacer, Reply
from p2pdyn.http.speech import Speech, Speeches
from p2pdyn.text.template import TemplateError
from p2pdyn.text.tokenizer import LONG_TEXT, Tokenizer

TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
ROUTING_VALUE = re.compile(rb"[!-~]{1,128}")

Prompt = tuple["array[int]", str]
"""Token ids, and the text to echo."""


class Generations:
    """Serves chat and text completions on one Backend."""

    def __init__(self, backend: Backend, metrics: HttpMetrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self.speeches = Speeches(backend)
        self._loop = asyncio.get_running_loop()
        self._pacer = Pacer(self._loop, backend.cancel, metrics)
        self._tasks: set[asyncio.Task[None]] = set()
        backend.on_batch = self._pacer.batch_done

    def chat(self, exchange: Exchange) -> None:
        self._answer(exchange, True)

    def completions(self, exchange: Exchange) -> None:
        self._answer(exchange, False)

    async def close(self, seconds: float) -> None:
        """Cancel what waits for a model or a thread; all else ends with its connection."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    def _answer(self, exchange: Exchange, chat: bool) -> None:
        began = self._loop.time()
        content = parse(exchange.body)
        exchange.body = b""
        speech = self.speeches.ready(content["model"])
        if speech is None:
            self.later(exchange, self._load(exchange, content, chat, began))
        else:
            self._read(exchange, content, speech, chat, began)

    async def _load(self, exchange: Exchange, content: dict[str, Any], chat: bool, began: float) -> None:
        speech = await self.speeches.of(content["model"])
        self._read(exchange, content, speech, chat, began)

    def _read(self, exchange: Exchange, content: dict[str, Any], speech: Speech, chat: bool, began: float) -> None:
        ask = chat_ask(content, speech.card) if chat else completion_ask(content, speech.card)
        texts = prompt_texts(ask, speech)
        if any(type(text) is str and len(text) > LONG_TEXT for text in texts):
            self.later(exchange, self._encode(exchange, ask, texts, speech, began))
        else:
            self._submit(exchange, ask, encode_prompts(ask, texts, speech.tokenizer), speech, began)

    async def _encode(
        self, exchange: Exchange, ask: Ask, texts: list[str | array[int]], speech: Speech, began: float
    ) -> None:
        prompts = await asyncio.to_thread(encode_prompts, ask, texts, speech.tokenizer)
        self._submit(exchange, ask, prompts, speech, began)

    def _submit(self, exchange: Exchange, ask: Ask, prompts: list[Prompt], speech: Speech, began: float) -> None:
        room = self._room(ask, prompts, speech)
        if not exchange.disconnected:
            jobs = _jobs(exchange, ask, prompts, room)
            self._reply(exchange, ask, prompts, speech, began).start(jobs)

    def later(self, exchange: Exchange, rest: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(_answered(exchange, rest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _room(self, ask: Ask, prompts: list[Prompt], speech: Speech) -> list[int]:
        """Tokens that the context leaves behind each prompt; HttpError 400 if max_tokens does not fit."""
        context = self._backend.context(ask.model) or speech.card.context or 2**31
        lengths = [len(tokens) for tokens, _ in prompts]
        if 0 in lengths:
            raise bad("The prompt is empty: it must have at least one token.", "prompt")
        if max(lengths) + (ask.max_tokens or 1) > context:
            asked = f" and max_tokens is {ask.max_tokens}" if ask.max_tokens else ""
            message = f"The context has {context} tokens; the prompt has {max(lengths)}{asked}: shorten one of them."
            raise bad(message, "messages" if ask.messages else "prompt", "context_length_exceeded")
        return [context - length for length in lengths]

    def _reply(self, exchange: Exchange, ask: Ask, prompts: list[Prompt], speech: Speech, began: float) -> Reply:
        shape: type[Shape] = ChatFormat if ask.messages else CompletionFormat
        form = shape(f"{random.getrandbits(96):024x}", ask.model, speech.tokenizer, ask.stream, ask.include_usage)
        silent = _silent(ask, speech)
        prompt_tokens = sum(len(tokens) for tokens, _ in prompts)
        self._metrics.prompt_tokens += prompt_tokens
        return Reply(exchange, self._backend, self._metrics, self._pacer, form, ask, silent, prompt_tokens, began)


async def _answered(exchange: Exchange, rest: Coroutine[Any, Any, None]) -> None:
    try:
        await rest
    except Exception as error:
        exchange.broke(error)


def _jobs(exchange: Exchange, ask: Ask, prompts: list[Prompt], room: list[int]) -> list[tuple[Job, int, str]]:
    """(job, number of its prompt, text to echo) of every choice, ``n`` of each prompt in a row."""
    fields = exchange.fields
    pin, session = routing(fields)
    name, trace = exchange.request_id.decode(), fields.get(b"traceparent", b"")
    trace = trace if trace and TRACEPARENT.fullmatch(trace) else b""
    whole = not (ask.stream or ask.stops or ask.params.logprobs is not None)
    client = exchange.client
    jobs: list[tuple[Job, int, str]] = []
    for number, (tokens, echo) in enumerate(prompts):
        most = ask.max_tokens or (room[number] if ask.messages else min(COMPLETION_TOKENS, room[number]))
        for copy in range(ask.n):
            params = ask.params
            if jobs:  # the first takes the request's own
                seed = None if params.seed is None else (params.seed + copy) & SEED_MASK
                params = replace(params, seed=seed)
            params.max_tokens, params.min_tokens = most, min(params.min_tokens, most)
            job = Job(ask.model, tokens, params, ask.resumable, pin, session, name, trace.decode(), whole, client)
            jobs.append((job, number, echo))
    return jobs


def routing(fields: dict[bytes, bytes]) -> tuple[str, str]:
    """The request's pin and session; HttpError 400 for what cannot be one."""
    return _routing(fields, b"x-p2pdyn-pin"), _routing(fields, b"x-p2pdyn-session")


def _routing(fields: dict[bytes, bytes], name: bytes) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not ROUTING_VALUE.fullmatch(value):
        raise bad(f"{name.decode()} must have from 1 to 128 visible ASCII characters.", name.decode())
    return value.decode()


def _silent(ask: Ask, speech: Speech) -> frozenset[int]:
    """Ids that end the sequence and are ordinary text to the tokenizer: they are counted but not shown."""
    ends = frozenset() if ask.params.ignore_eos else speech.plain_ends
    if ask.params.stop_token_ids:
        ends = ends.union(token for token in ask.params.stop_token_ids if not speech.tokenizer.is_special(token))
    return ends


def _chat_text(ask: Ask, speech: Speech) -> str:
    if speech.template is None:
        raise bad(f"Chat is not possible here: {speech.no_chat}.", "messages", "no_chat_template")
    try:
        return speech.template.render(ask.messages, ask.add_generation_prompt, ask.template)
    except TemplateError as error:
        raise bad(f"{str(error)[:1].upper()}{str(error)[1:]}.", "messages", "chat_template_error") from None


def prompt_texts(ask: Ask, speech: Speech) -> list[str | array[int]]:
    """What the prompts are before they are tokens: a chat's is rendered."""
    return [_chat_text(ask, speech)] if ask.messages else ask.prompts


def encode_prompts(ask: Ask, texts: list[str | array[int]], tokenizer: Tokenizer) -> list[Prompt]:
    """``texts`` as token ids. A chat's template has set all special tokens; a completion gets the model's own."""
    if ask.messages:
        return [(tokenizer.encode(text, special=False), "") for text in texts if isinstance(text, str)]
    found: list[Prompt] = []
    for text in texts:
        if isinstance(text, str):
            found.append((tokenizer.encode(text, special=True), text if ask.echo else ""))
            continue
        if max(text) >= tokenizer.vocabulary:
            raise bad("prompt holds a token id outside the vocabulary.", "prompt")
        found.append((text, tokenizer.decode(text) if ask.echo else ""))
    return found
