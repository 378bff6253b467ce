"""Our sampling parameters as SGLang's, and its chunks as our outputs."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import Output, Sequence
from p2pdyn.engines.hosted import one_line

ALWAYS = ("logprobs", "min_p", "penalties", "priority", "top_k")
"""Features that every SGLang has."""
WITH_TOKENIZER = ("guided", "min_tokens")
"""... that it has unless it is told ``--skip-tokenizer-init``."""
GUIDED = {"json": "json_schema", "regex": "regex", "grammar": "ebnf", "choice": "ebnf"}
"""Our kinds of guided decoding, and SGLang's parameter for each."""
LEAST_TOP_P = 1e-6
"""SGLang refuses 0, which OpenAI's API allows: only the likeliest token."""


def to_sglang(sequence: Sequence, room: int, eos: tuple[int, ...], seeded: bool) -> dict[str, Any]:
    """SGLang's sampling parameters. ``room`` is from :func:`p2pdyn.engines.hosted.budget`, ``eos`` the model's end
    tokens; ``seeded``: this SGLang goes by seeds. Raises ValueError for what SGLang does not take."""
    params = sequence.params
    produced = len(sequence.tokens) - sequence.prompt_len
    stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos)
    asked: dict[str, Any] = {
        "max_new_tokens": room,
        "min_new_tokens": max(0, min(params.min_tokens - produced, room)),
        "temperature": params.temperature,
        "top_p": max(params.top_p, LEAST_TOP_P),
        "top_k": params.top_k or -1,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "stop_token_ids": list(dict.fromkeys(stops)),
        "ignore_eos": params.ignore_eos,
        "skip_special_tokens": False,
    }
    if seeded and params.seed is not None:
        asked["sampling_seed"] = params.seed
    asked.update(_guided(params))
    return asked


def _guided(params: SamplingParams) -> dict[str, str]:
    if params.guided is None:
        return {}
    if len(params.guided) != 1:
        raise ValueError("guided decoding takes one of json, regex, grammar and choice at a time")
    ((kind, form),) = params.guided.items()
    if kind not in GUIDED:
        raise ValueError(f"guided decoding by {kind} is not known: use {', '.join(GUIDED)}")
    if kind == "choice":
        assert isinstance(form, list | tuple)
        form = "root ::= " + " | ".join(json.dumps(str(choice), ensure_ascii=False) for choice in form)
    return {GUIDED[kind]: form if isinstance(form, str) else json.dumps(form)}


def watched(params: SamplingParams) -> frozenset[int]:
    """Stop tokens that SGLang would run past: with ``ignore_eos`` it looks at none."""
    return frozenset(params.stop_token_ids) if params.ignore_eos else frozenset()


def from_sglang(key: int, chunk: dict[str, Any], first: bool, alternatives: int | None) -> Output:
    """One chunk of a stream, of one token or of several where this process lagged behind."""
    meta = chunk["meta_info"]
    tokens = tuple(chunk["output_ids"])
    ended = meta["finish_reason"]
    output = Output(key, tokens, _finish(ended, first) if ended else "")
    if output.finish in ("error", "invalid"):
        output.tokens = ()  # an abort's last chunk repeats what was told already
        output.detail = one_line(ValueError(ended.get("message") or "SGLang gave the request up"))
        return output
    if first:
        output.cached = meta.get("cached_tokens") or 0
    if alternatives is not None and tokens:
        output.logprobs = _logprobs(meta, len(tokens), alternatives)
    return output


def _finish(ended: dict[str, Any], first: bool) -> str:
    """``first``: nothing was told before, so that an abort that blames the request refuses it."""
    kind: str = ended["type"]
    if kind in ("stop", "length"):
        return kind
    return "invalid" if first and ended.get("status_code") == HTTPStatus.BAD_REQUEST else "error"


def _logprobs(meta: dict[str, Any], count: int, alternatives: int) -> tuple[Any, ...]:
    """SGLang's rows are (logprob, token id, text); some versions tell all since the first token."""
    chosen = meta["output_token_logprobs"][-count:]
    likeliest = meta["output_top_logprobs"][-count:] if alternatives else [()] * count
    rows = zip(chosen, likeliest, strict=True)
    return tuple((mine[0], tuple((row[1], row[0]) for row in others[:alternatives])) for mine, others in rows)


def cut(output: Output, stops: frozenset[int]) -> Output:
    """``output`` up to the first of ``stops``, which ends it."""
    for at, token in enumerate(output.tokens):
        if token in stops:
            logprobs = output.logprobs[: at + 1]
            return Output(output.key, output.tokens[: at + 1], "stop", output.cached, logprobs)
    return output
