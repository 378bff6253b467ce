"""Prefill on one worker, decode on another: what vLLM's NIXL connector is told, and what it answers."""

from __future__ import annotations

from typing import Any

import msgpack

from p2pdyn.engines.base import Held, Output
from p2pdyn.engines.hosted import Unreadable

MAX_PARAMS = 4 * 2**20
"""Bytes: four a block and some names."""


def prefill() -> dict[str, Any]:
    """For a request whose blocks are to be held when its prompt is computed."""
    return {"do_remote_decode": True, "do_remote_prefill": False}


def held(key: int, result: Any) -> Held | Output:
    """The last output of such a request; an error where the connector holds nothing."""
    params = result.kv_transfer_params
    if not params or not params.get("remote_request_id"):
        return Output(key, (), "error", detail="vLLM's KV connector holds nothing of this prompt")
    cached = result.num_cached_tokens or 0
    packed: bytes = msgpack.packb({**params, "remote_prefill_cached_tokens": cached})
    return Held(key, cached=cached, params=packed)


def request_of(packed: bytes) -> str:
    """vLLM's own name of the request that the other side holds. Raises ValueError."""
    return str(decode(packed)["remote_request_id"])


def decode(packed: bytes) -> dict[str, Any]:
    """For the request that pulls those blocks. Raises Unreadable for what is no such answer."""
    try:
        if len(packed) > MAX_PARAMS:
            raise ValueError
        params = msgpack.unpackb(packed)
        if not isinstance(params, dict) or not params["remote_request_id"] or not params["do_remote_prefill"]:
            raise ValueError
    except Exception as error:  # msgpack raises several unrelated classes
        raise Unreadable("what the prefill worker said of its blocks cannot be read") from error
    return params
