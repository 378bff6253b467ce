"""What a generation request may say, and what it means: the tables of docs/design/http.md as code.

Every field is honoured, harmless, or refused with 400; none is silently dropped.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from p2pdyn.core.types import SamplingParams
from p2pdyn.http.errors import HttpError, bad
from p2pdyn.http.fields import (
    Check,
    boolean,
    checked,
    ignored,
    integer,
    items,
    mapping,
    neutral,
    number,
    one_or_more,
    text,
)
from p2pdyn.http.jsonbody import load_object
from p2pdyn.text.card import ModelCard

MAX_N = 32
MAX_SEQUENCES = 128
"""Sequences of one request, over its prompts and ``n``: what one client may put into a queue at once."""
MAX_STOPS = 16
MAX_STOP = 256
MAX_MESSAGES = 4096
MAX_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_SCHEMA = 128 * 1024
SEED_MASK = 2**63 - 1
COMPLETION_TOKENS = 16
"""max_tokens of a completion that names none (OpenAI's default); a chat may use the rest of the context."""

COMMON: Mapping[str, Check] = {
    "model": text(128),
    "stream": boolean,
    "stream_options": mapping,
    "n": integer(1, MAX_N),
    "stop": one_or_more(text(MAX_STOP), MAX_STOPS),
    "stop_token_ids": items(integer(0, 2**32 - 1), 64),
    "max_tokens": integer(1, MAX_TOKENS),
    "min_tokens": integer(0, MAX_TOKENS),
    "ignore_eos": boolean,
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": integer(-1, 2**31 - 1),
    "min_p": number(0, 1),
    "repetition_penalty": number(0, 10, above=True),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "seed": integer(-(2**63), 2**63 - 1),
    "cache_salt": text(128),
    "priority": integer(-(2**31), 2**31 - 1),
    "response_format": mapping,
    "logit_bias": neutral({}, because="engines here take no bias by token"),
    # Without influence on the answer.
    "user": ignored,
    "metadata": ignored,
    "safety_identifier": ignored,
    "prompt_cache_key": ignored,
    "prompt_cache_retention": ignored,
    "service_tier": neutral("auto", "default", because="there is one tier"),
    "store": neutral(False, because="nothing is stored"),
}
CHAT: Mapping[str, Check] = {
    **COMMON,
    "messages": items(mapping, MAX_MESSAGES, 1),
    "max_completion_tokens": integer(1, MAX_TOKENS),
    "logprobs": boolean,
    "top_logprobs": integer(0, MAX_LOGPROBS),
    "add_generation_prompt": boolean,
    "chat_template_kwargs": mapping,
    "tools": neutral([], because="calls of tools are not parsed yet"),
    "tool_choice": neutral("none", "auto", because="calls of tools are not parsed yet"),
    "functions": neutral([], because="calls of tools are not parsed yet"),
    "function_call": neutral("none", "auto", because="calls of tools are not parsed yet"),
    "parallel_tool_calls": neutral(True, False, because="calls of tools are not parsed yet"),
    "modalities": neutral(["text"], because="answers are text"),
    "audio": neutral(because="answers are text"),
    "prediction": neutral(because="no engine here uses it"),
    "reasoning_effort": neutral("none", because="use chat_template_kwargs, where the model's template knows it"),
    "verbosity": neutral("medium", because="no model here knows it"),
    "web_search_options": neutral(because="there is no search"),
}
COMPLETION: Mapping[str, Check] = {
    **COMMON,
    "prompt": lambda value, name: value,
    "echo": boolean,
    "logprobs": integer(0, MAX_LOGPROBS),
    "best_of": integer(1, MAX_N),
    "suffix": neutral("", because="no engine here fills in"),
}
MESSAGE: Mapping[str, Check] = {
    "role": text(16),
    "content": lambda value, name: value,
    "name": text(256),
    "refusal": neutral("", because="it is only for answers"),
    "tool_calls": neutral([], because="calls of tools are not parsed yet"),
    "tool_call_id": neutral(because="calls of tools are not parsed yet"),
}
ROLES = ("system", "developer", "user", "assistant")
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})

FEATURE_OF: Mapping[str, tuple[str, Any]] = {
    "min_p": ("min_p", 0.0),
    "min_tokens": ("min_tokens", 0),
    "presence_penalty": ("penalties", 0.0),
    "frequency_penalty": ("penalties", 0.0),
    "repetition_penalty": ("penalties", 1.0),
}
"""Parameter: (the engine feature that honours it, the value that asks for nothing)."""
PARAMS = frozenset({"temperature", "top_p", "top_k", "seed", "ignore_eos", "priority", "cache_salt"}).union(FEATURE_OF)
"""Fields that are sampling parameters of the same name."""


@dataclass(slots=True)
class Ask:
    """One validated request. ``prompts`` are texts or token ids (completions); ``messages`` is for chat.

    ``params`` lacks max_tokens when ``max_tokens`` is None, until the prompt's length is known.
    """

    model: str
    stream: bool
    include_usage: bool
    n: int
    stops: tuple[str, ...]
    max_tokens: int | None
    params: SamplingParams
    messages: list[dict[str, Any]] = field(default_factory=list)
    template: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    prompts: list[str | array[int]] = field(default_factory=list)
    echo: bool = False

    @property
    def resumable(self) -> bool:
        """Whether another worker could continue a part of the answer exactly (docs/design/requests.md)."""
        params = self.params
        return (
            params.prompt_logprobs is None
            and params.guided is None
            and params.presence_penalty == 0
            and params.frequency_penalty == 0
            and params.repetition_penalty == 1
        )


def parse(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object of a generation's body, its model named."""
    content = load_object(body)
    model = content.get("model")
    if type(model) is not str:
        raise bad("model must be given as a string.", "model", "missing_field" if model is None else "invalid_type")
    return content


def chat_ask(content: dict[str, Any], card: ModelCard) -> Ask:
    """Raises HttpError 400."""
    given = checked(content, CHAT)
    if "messages" not in given:
        raise bad("messages must be given as a list of at least one message.", "messages", "missing_field")
    most, same = given.pop("max_completion_tokens", None), given.get("max_tokens")
    if most is not None and same is not None and most != same:
        raise bad("max_tokens and max_completion_tokens differ: give one.", "max_tokens")
    given["max_tokens"] = most if most is not None else same
    top = given.pop("top_logprobs", None)
    wanted = given.pop("logprobs", False)
    if top is not None and not wanted:
        raise bad("top_logprobs needs logprobs: true.", "top_logprobs")
    ask = _ask(given, card, (top or 0) if wanted else None)
    ask.messages = [_message(message, index) for index, message in enumerate(given["messages"])]
    ask.template = given.get("chat_template_kwargs", {})
    if RESERVED & ask.template.keys():
        raise bad("chat_template_kwargs may not set what the request itself sets.", "chat_template_kwargs")
    ask.add_generation_prompt = given.get("add_generation_prompt", True)
    return ask


def completion_ask(content: dict[str, Any], card: ModelCard) -> Ask:
    """Raises HttpError 400."""
    given = checked(content, COMPLETION)
    if "prompt" not in given:
        raise bad("prompt must be given.", "prompt", "missing_field")
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise bad("best_of must equal n: all choices are returned.", "best_of", "unsupported_parameter")
    ask = _ask(given, card, given.pop("logprobs", None))
    ask.echo = given.get("echo", False)
    if ask.echo and ask.params.logprobs is not None:
        raise bad(
            "echo with logprobs is not supported: prompts have no logprobs here.", "echo", "unsupported_parameter"
        )
    ask.prompts = _prompts(given["prompt"])
    if len(ask.prompts) * ask.n > MAX_SEQUENCES:
        raise bad(f"At most {MAX_SEQUENCES} sequences (prompts times n) make one request.", "prompt")
    return ask


def _ask(given: dict[str, Any], card: ModelCard, logprobs: int | None) -> Ask:
    stream = given.get("stream", False)
    options = checked(given["stream_options"], STREAM_OPTIONS, "stream_options.") if "stream_options" in given else {}
    if options and not stream:
        raise bad("stream_options needs stream: true.", "stream_options")
    ask = Ask(
        model=given["model"],
        stream=stream,
        include_usage=options.get("include_usage", False),
        n=given.get("n", 1),
        stops=tuple(dict.fromkeys(given.get("stop", ()))),
        max_tokens=given.get("max_tokens"),
        params=_params(given, card, logprobs),
    )
    if ask.max_tokens is not None and ask.params.min_tokens > ask.max_tokens:
        raise bad("min_tokens is greater than max_tokens.", "min_tokens")
    return ask


STREAM_OPTIONS: Mapping[str, Check] = {
    "include_usage": boolean,
    "include_obfuscation": ignored,
    "continuous_usage_stats": neutral(False, because="usage comes once, at the end"),
}


def _params(given: dict[str, Any], card: ModelCard, logprobs: int | None) -> SamplingParams:
    features = card.features
    for name in given.keys() & FEATURE_OF.keys():
        feature, nothing = FEATURE_OF[name]
        if feature not in features and given[name] != nothing:
            raise _not_honoured(name)
    if logprobs is not None and "logprobs" not in features:
        raise _not_honoured("logprobs")
    values = _defaults(card)
    for name in given.keys() & PARAMS:
        values[name] = given[name]
    params = SamplingParams(**values)
    params.top_k = max(0, params.top_k)
    if params.temperature == 0:
        params.seed = None
    elif params.seed is not None and "seed" not in features:
        raise _not_honoured("seed")
    elif params.seed is None:
        params.seed = random.getrandbits(63)  # another worker must be able to go on with the same stream
    else:
        params.seed &= SEED_MASK
    params.stop_token_ids = tuple(given.get("stop_token_ids", ()))
    params.logprobs = logprobs
    params.guided = _guided(given.get("response_format"), features)
    return params


def _defaults(card: ModelCard) -> dict[str, Any]:
    """What the model's makers recommend, as far as the engine does it."""
    found: dict[str, Any] = {}
    for name, value in card.generation.items():
        if name == "temperature" or (name == "top_p" and value):
            found[name] = value
        elif name == "top_k":
            found[name] = int(value)
        elif (name == "min_p" and name in card.features) or (
            name == "repetition_penalty" and value and "penalties" in card.features
        ):
            found[name] = value
    return found


def _not_honoured(name: str) -> HttpError:
    return bad(f"{name} is not supported by the engine that serves this model.", name, "unsupported_parameter")


def _guided(form: dict[str, Any] | None, features: tuple[str, ...]) -> dict[str, object] | None:
    if form is None or form == {"type": "text"}:
        return None
    kind = form.get("type")
    if kind not in ("json_object", "json_schema"):
        raise bad("response_format.type must be text, json_object or json_schema.", "response_format")
    if "guided" not in features:
        raise _not_honoured("response_format")
    if kind == "json_object":
        checked(form, {"type": ignored}, "response_format.")
        return {"json": {"type": "object"}}
    inner = mapping(
        checked(form, {"type": ignored, "json_schema": mapping}, "response_format.").get("json_schema"), "json_schema"
    )
    table = {"name": text(64), "description": ignored, "strict": boolean, "schema": mapping}
    schema = mapping(checked(inner, table, "json_schema.").get("schema"), "json_schema.schema")
    if len(orjson.dumps(schema)) > MAX_SCHEMA:
        raise bad(f"json_schema.schema is longer than {MAX_SCHEMA} bytes.", "response_format")
    return {"json": schema}


def _message(message: dict[str, Any], index: int) -> dict[str, Any]:
    where = f"messages[{index}]."
    given = checked(message, MESSAGE, where)
    role = given.get("role")
    if role not in ROLES:
        raise bad(f"{where}role must be one of {', '.join(ROLES)}.", where + "role")
    content = _content(given.get("content"), where + "content")
    plain = {"role": role, "content": content}
    if "name" in given:
        plain["name"] = given["name"]
    return plain


def _content(value: Any, name: str) -> str:
    if type(value) is str:
        return value
    if type(value) is not list or not value:
        raise bad(f"{name} must be a string or a list of text parts.", name, "invalid_type")
    parts = [checked(mapping(part, name), {"type": text(32), "text": text(2**31, 0)}, name + ".") for part in value]
    if any(part.get("type") != "text" or "text" not in part for part in parts):
        raise bad(f"{name}: only parts of type text are supported.", name, "unsupported_parameter")
    return "\n".join(part["text"] for part in parts)


def _prompts(prompt: Any) -> list[str | array[int]]:
    """A text, several, token ids, or several lists of them."""
    if type(prompt) is str:
        return [prompt]
    if type(prompt) is list and prompt:
        if type(prompt[0]) is int:
            return [_ids(prompt)]
        if len(prompt) > MAX_SEQUENCES:
            raise bad(f"At most {MAX_SEQUENCES} prompts make one request.", "prompt")
        if all(type(one) is str for one in prompt):
            return list(prompt)
        if all(type(one) is list and one for one in prompt):
            return [_ids(one) for one in prompt]
    raise bad("prompt must be a string, token ids, or a list of one of them.", "prompt", "invalid_type")


def _ids(values: list[Any]) -> array[int]:
    if set(map(type, values)) != {int}:
        raise bad("prompt must hold integers only where it holds token ids.", "prompt", "invalid_type")
    try:
        return array("I", values)
    except OverflowError:
        raise bad("prompt holds a token id outside the vocabulary.", "prompt") from None
