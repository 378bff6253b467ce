"""Our sampling parameters as vLLM's, and its outputs as ours."""

from __future__ import annotations

from typing import Any

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import Output, Sequence

FEATURES = ("logprobs", "min_p", "min_tokens", "penalties", "priority", "seed", "top_k")
"""Of every model; "guided" needs a tokenizer in vLLM, "lora" adapters."""
GUIDED = ("json", "regex", "grammar", "choice")
LEAST_TOP_P = 1e-6
"""vLLM refuses 0, which OpenAI's API allows: only the likeliest token."""


def to_vllm(sequence: Sequence, room: int, eos: tuple[int, ...], transfer: dict[str, Any] | None) -> Any:
    """vLLM's SamplingParams. ``room`` is from :func:`p2pdyn.engines.hosted.budget`, ``eos`` the model's end tokens,
    ``transfer`` what the KV connector is told. Raises ValueError for what vLLM does not take."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    params = sequence.params
    produced = len(sequence.tokens) - sequence.prompt_len
    stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos)
    return vllm.SamplingParams(
        max_tokens=room,
        min_tokens=0 if sequence.hand_over else max(0, min(params.min_tokens - produced, room)),
        temperature=params.temperature,
        top_p=max(params.top_p, LEAST_TOP_P),
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        stop_token_ids=list(dict.fromkeys(stops)),
        ignore_eos=params.ignore_eos,
        logprobs=None if sequence.hand_over else params.logprobs,
        structured_outputs=None if sequence.hand_over else _structured(params),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if transfer is None else {"kv_transfer_params": transfer},
    )


def warm_params() -> Any:
    """For a prompt whose answer nobody reads."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        max_tokens=4, temperature=0.0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def _structured(params: SamplingParams) -> Any:
    if params.guided is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    unknown = params.guided.keys() - set(GUIDED)
    if unknown:
        raise ValueError(f"guided decoding by {', '.join(sorted(unknown))} is not known: use {', '.join(GUIDED)}")
    return StructuredOutputsParams(**params.guided)


def blames_request(error: BaseException) -> bool:
    """Whether vLLM's refusal means the request itself; what says so is a class of its own since 0.32."""
    return isinstance(error, ValueError) or any(kind.__name__ == "VLLMClientError" for kind in type(error).__mro__)


def from_vllm(key: int, result: Any, first: bool, alternatives: int | None) -> Output:
    """One RequestOutput of vLLM: a delta of one token, or of several where this process lagged behind."""
    (completion,) = result.outputs
    tokens = tuple(completion.token_ids)
    output = Output(key, tokens, completion.finish_reason or "")
    if first:
        output.cached = result.num_cached_tokens or 0
    if alternatives is not None and completion.logprobs:
        rows = zip(tokens, completion.logprobs, strict=True)
        output.logprobs = tuple(_logprobs(token, row, alternatives) for token, row in rows)
    return output


def _logprobs(token: int, row: dict[int, Any], alternatives: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """vLLM's row has the chosen token and the likeliest ones, each with its rank from 1."""
    likeliest = sorted((entry.rank, other, entry.logprob) for other, entry in row.items() if entry.rank <= alternatives)
    return row[token].logprob, tuple((other, value) for _, other, value in likeliest[:alternatives])
