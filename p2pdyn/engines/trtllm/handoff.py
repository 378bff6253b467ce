"""Prefill on one worker, decode on another: TensorRT-LLM's DisaggregatedParams, on their way between two processes.

The context side answers its first token and, in ``opaque_state``, where its cache is to be had; the generation side
begins with that token.  All fields that are set travel; one that the other side does not know is refused.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from hashlib import blake2b
from typing import Any

import msgpack

from p2pdyn.engines.base import Held, Output
from p2pdyn.engines.trtllm.sampling import new_tokens
from p2pdyn.engines.trtllm.versions import takes

MAX_PARAMS = 4 * 2**20
"""Bytes."""
ENDED = "ended"
"""In place of where the cache is: the first token was the last one, so nothing is to be fetched."""
CACHED = "cached"
"""Beside either: how many prompt tokens were cached there."""
LOGPROB = "logprob"
BAD = "what the prefill worker said of its blocks cannot be read"


def machine(node: str, epoch: int) -> int:
    """14 bits that are likely to differ between workers: TensorRT-LLM makes ids of them that hold across a cluster."""
    return int.from_bytes(blake2b(f"{node}-{epoch}".encode(), digest_size=2).digest(), "big") >> 2


def request_id(number: int) -> int | None:
    """An id by which both sides know a request; None where this TensorRT-LLM has none. ``number`` is from
    :func:`machine`. Up to 1.3.0rc21 machines have 10 bits, from rc22 on nodes 8 and processes 6."""
    try:
        from tensorrt_llm.llmapi.disagg_utils import get_global_disagg_request_id as make
    except ImportError:
        return None
    if "process_id" in inspect.signature(make).parameters:
        return int(make(number >> 6, number & 63))
    return int(make(number >> 4))


def context_only(number: int) -> Any:
    """The parameters of a prompt that is computed for another worker."""
    from tensorrt_llm.llmapi import DisaggregatedParams

    params: dict[str, Any] = {"request_type": "context_only"}
    if takes(DisaggregatedParams, "disagg_request_id") and (made := request_id(number)) is not None:
        params["disagg_request_id"] = made
    return DisaggregatedParams(**params)


def held(key: int, answer: Any, stops: frozenset[int], end: int) -> Held | Output:
    """The answer to such a prompt; an error where nothing is held. ``stops``, ``end``: what may have ended it at its
    first token (:func:`p2pdyn.engines.trtllm.sampling.new_tokens`)."""
    (completion,) = answer.outputs
    cached = int(getattr(answer, "cached_tokens", 0) or 0)
    if completion.finish_reason == "stop":
        tokens, _ = new_tokens(completion, 0, stops, end)
        return Held(key, cached=cached, params=_pack({ENDED: list(tokens), CACHED: cached}))
    params = completion.disaggregated_params
    if params is None or not params.opaque_state:
        return Output(
            key, (), "error", detail="TensorRT-LLM holds nothing of this prompt: is its cache transceiver on?"
        )
    found = {one.name: getattr(params, one.name) for one in fields(params)}
    packed = {name: _plain(value) for name, value in found.items() if value is not None and name != "request_type"}
    return Held(key, cached=cached, params=_pack({**packed, CACHED: cached}))


def decode(packed: bytes) -> dict[str, Any]:
    """What :func:`held` packed. Raises ValueError."""
    try:
        if len(packed) > MAX_PARAMS:
            raise ValueError
        found = msgpack.unpackb(packed, strict_map_key=False)
        if not isinstance(found, dict) or not (found.get("opaque_state") or isinstance(found.get(ENDED), list)):
            raise ValueError
    except Exception as error:  # msgpack raises several unrelated classes
        raise ValueError(BAD) from error
    return found


def generation_only(found: dict[str, Any]) -> Any:
    """The parameters of the request that fetches the cache, from :func:`decode`. Raises ValueError."""
    from tensorrt_llm.llmapi import DisaggregatedParams

    values = {name: value for name, value in found.items() if name != CACHED}
    unknown = [name for name in values if not takes(DisaggregatedParams, name)]
    if unknown:
        raise ValueError(f"the prefill worker's TensorRT-LLM tells {', '.join(unknown)}, which this one does not know")
    return DisaggregatedParams(
        request_type="generation_only", **{name: _rebuilt(value) for name, value in values.items()}
    )


def carries_logprobs() -> bool:
    """Whether the first token's logprobs travel with it."""
    from tensorrt_llm.llmapi import DisaggregatedParams

    return takes(DisaggregatedParams, "first_gen_log_probs")


def _pack(found: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(found)
    return packed


def _plain(value: Any) -> Any:
    """``value`` in msgpack's types; maps and logprobs are marked. Raises ValueError for what has no such form."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {"map": [[_plain(name), _plain(one)] for name, one in value.items()]}
    if hasattr(value, LOGPROB):
        return {LOGPROB: [value.logprob, value.rank]}
    raise ValueError(f"TensorRT-LLM's hand-over holds a {type(value).__name__}, which cannot be sent")


def _rebuilt(value: Any) -> Any:
    if isinstance(value, list):
        return [_rebuilt(one) for one in value]
    if not isinstance(value, dict):
        return value
    if LOGPROB in value:
        from tensorrt_llm.executor.result import Logprob

        return Logprob(*value[LOGPROB])
    return {_rebuilt(name): _rebuilt(one) for name, one in value["map"]}
