"""Our sampling parameters as TensorRT-LLM's, and its outputs as ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import Output, Sequence
from p2pdyn.engines.hosted import one_line
from p2pdyn.engines.trtllm.versions import parameters

FEATURES = ("logprobs", "min_tokens", "top_k")
"""Of every version; more by :func:`p2pdyn.engines.trtllm.versions.honoured` and by arguments."""
GUIDED = ("json", "regex", "grammar", "choice")
SEED_MASK = 2**63 - 1
NO_TOKEN = -1
"""TensorRT-LLM's end id of a request that no token ends."""
FINISHES = {"stop": "stop", "length": "length", "cancelled": "abort", None: ""}
"""By TensorRT-LLM's finish_reason; any other is an error. "not_finished" is of context_only requests alone, which
:func:`p2pdyn.engines.trtllm.handoff.held` reads."""
IGNORABLE = {
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("penalties", 1.0),
    "presence_penalty": ("penalties", 0.0),
    "frequency_penalty": ("penalties", 0.0),
}
"""Parameters that some samplers take and ignore: the feature of those that do not, and the value that does nothing."""


class Invalid(ValueError):
    """What no worker of this model could do: the client's request is at fault."""


def stops_of(params: SamplingParams, eos: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens that end a sequence, the model's own first."""
    return tuple(dict.fromkeys((*(() if params.ignore_eos else eos), *params.stop_token_ids)))


def to_trtllm(sequence: Sequence, room: int, eos: tuple[int, ...], features: Iterable[str]) -> Any:
    """TensorRT-LLM's SamplingParams. ``room`` is from :func:`p2pdyn.engines.hosted.budget`, ``eos`` the model's end
    tokens. Raises Invalid, or ValueError for what this version or this worker lacks, or would ignore."""
    import tensorrt_llm

    params, able = sequence.params, frozenset(features)
    stops = stops_of(params, eos)
    wanted: dict[str, Any] = {
        "max_tokens": room,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "end_id": stops[0] if stops else NO_TOKEN,
        "pad_id": stops[0] if stops else 0,
        "ignore_eos": not stops,
        "include_stop_str_in_output": True,
        "detokenize": False,
    }
    if stops[1:]:
        wanted["stop_token_ids"] = list(stops[1:])
    if params.seed is not None:
        wanted["seed"] = params.seed & SEED_MASK
    wanted |= _held_back(sequence, room, stops)
    wanted |= _if_honoured(params, able)
    if params.logprobs is not None:
        wanted["logprobs"] = max(1, params.logprobs)  # 0 means none before 1.3.0rc26
    if params.guided is not None:
        if "guided" not in able:
            raise ValueError("guided decoding needs --guided-decoding-backend xgrammar or llguidance after --")
        wanted["guided_decoding"] = _guided(params.guided)
    known = parameters(tensorrt_llm.SamplingParams)
    if known is not None and (unknown := sorted(wanted.keys() - known)):
        raise ValueError(f"this TensorRT-LLM has no {', '.join(unknown)}")
    try:
        return tensorrt_llm.SamplingParams(**wanted)
    except ValueError as error:  # it looks at nothing but the parameters themselves
        raise Invalid(one_line(error)) from error


def _held_back(sequence: Sequence, room: int, stops: tuple[int, ...]) -> dict[str, int]:
    least = max(0, min(sequence.params.min_tokens - (len(sequence.tokens) - sequence.prompt_len), room))
    if not least or not stops:  # without an end id it would hold back the vocabulary's last token instead
        return {}
    if len(stops) > 1:
        raise Invalid(
            f"min_tokens: TensorRT-LLM holds back one end token, and here are {len(stops)}: ask with ignore_eos and at "
            "most one stop token, or without min_tokens"
        )
    return {"min_tokens": least}


def _if_honoured(params: SamplingParams, able: frozenset[str]) -> dict[str, float]:
    """What is asked for of :data:`IGNORABLE`. Raises ValueError if TensorRT-LLM would ignore it."""
    asked = {
        name: getattr(params, name) for name, (_, nothing) in IGNORABLE.items() if getattr(params, name) != nothing
    }
    if ignored := [name for name in asked if IGNORABLE[name][0] not in able]:
        raise ValueError(f"this TensorRT-LLM's sampler ignores {', '.join(ignored)}")
    return asked


def _guided(guided: dict[str, object]) -> Any:
    from tensorrt_llm.llmapi import GuidedDecodingParams

    unknown = guided.keys() - set(GUIDED)
    if unknown:
        raise Invalid(f"guided decoding by {', '.join(sorted(unknown))} is not known: use {', '.join(GUIDED)}")
    wanted = dict(guided)
    choice = wanted.pop("choice", None)
    if isinstance(choice, list | tuple):
        wanted["regex"] = "(" + "|".join(re.escape(str(one)) for one in choice) + ")"
    return GuidedDecodingParams(**wanted)


def priority_of(ours: int) -> float:
    """TensorRT-LLM's priorities lie between 0 and 1, a higher one goes first, and 0.5 is usual; of ours the lower one
    goes first."""
    return 0.5 - 0.5 * ours / (1 + abs(ours))


# ---- outputs


def new_tokens(completion: Any, told: int, stops: frozenset[int], end: int) -> tuple[tuple[int, ...], str]:
    """(tokens behind the first ``told``, finish) of a CompletionOutput, whose tokens are all so far. With ``stop`` the
    last one is what ended it, which TensorRT-LLM may have taken away; ``end`` is the end id."""
    tokens = tuple(completion.token_ids[told:])
    finish = FINISHES.get(completion.finish_reason, "error")
    if finish == "stop" and (not completion.token_ids or completion.token_ids[-1] not in stops):
        reason = completion.stop_reason
        tokens = (*tokens, reason if type(reason) is int else end)
    return tokens, finish


def logprobs_of(completion: Any, first: int, tokens: tuple[int, ...], alternatives: int) -> tuple[Any, ...]:
    """A row for each of ``tokens``, the ``first``-th and those behind it. Raises ValueError where one is missing."""
    rows = list(completion.logprobs or ())[first : first + len(tokens)]
    told = []
    for token, row in zip(tokens, rows, strict=False):
        if not isinstance(row, dict) or token not in row:
            break
        likeliest = sorted(row.items(), key=lambda item: -item[1].logprob)[:alternatives]
        told.append((row[token].logprob, tuple((other, entry.logprob) for other, entry in likeliest)))
    if len(told) < len(tokens):
        raise ValueError("TensorRT-LLM told no logprob of a token that it chose")
    return tuple(told)


def finished(key: int, completion: Any) -> Output:
    """The end of a sequence that TensorRT-LLM gave up."""
    return Output(key, (), "error", detail=f"TensorRT-LLM ended this sequence: {completion.finish_reason}")
