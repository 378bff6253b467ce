"""Values that travel inside messages as bytes of their own: PeerInfo, SamplingParams, logprobs.

PeerInfo and SamplingParams are maps of the fields that differ from their defaults.  The same rules hold as for
messages: whatever a peer sends, :class:`WireError` or a value with exactly the types and ranges named here.
"""

from __future__ import annotations

import dataclasses
from math import isfinite
from typing import Annotated, Any, NamedTuple

import msgpack

from p2pdyn.constants import PEER_INFO_MAX
from p2pdyn.core.request import Logprobs
from p2pdyn.core.types import AGGREGATED, DECODE, FRONTEND, PREFILL, PeerInfo, SamplingParams, ServedModel
from p2pdyn.wire.pack import unpack
from p2pdyn.wire.requests import MAX_STEP_TOKENS, describe_params
from p2pdyn.wire.schema import U16, U32, U64, Bound, Cap, Name
from p2pdyn.wire.shape import Shape, WireError, field_shapes, shape

DETAIL_MAX = 512
PARAMS_MAX = 256 * 1024
MAX_RANKS = 256
MAX_DEPTH = 32
"""Of ``guided`` and ``extra``: JSON schemas in the field stay below 20."""

_Word = Annotated[str, Cap(64)]
_Positive = Annotated[float, Bound(0, 1e6)]
_Share = Annotated[float, Bound(0, 1)]
_Penalty = Annotated[float, Bound(-1e6, 1e6)]


class _Model(NamedTuple):
    name: Name
    card: _Word
    fingerprint: _Word
    block_size: U32
    context: U64
    ranks: Annotated[int, Bound(1, MAX_RANKS)]
    kv_events: bool
    moves_kv: _Word


_MODEL = field_shapes(_Model, "PeerInfo.models")
_LEAST_MODEL = len(_MODEL) - 1
"""Fields of a row before ``moves_kv`` was added; one that has nothing to say there is as short still."""


def _dump_models(models: Any) -> Any:
    return [_dump_model(model) for model in models]


def _dump_model(m: ServedModel) -> list[Any]:
    row = (m.name, m.card, m.fingerprint, m.block_size, m.context, m.ranks, m.kv_events, m.moves_kv)
    plain = [one.dump(value) for one, value in zip(_MODEL, row, strict=True)]
    return plain if m.moves_kv else plain[:_LEAST_MODEL]


def _load_models(plain: Any) -> tuple[ServedModel, ...]:
    if type(plain) is not tuple or any(
        type(row) is not tuple or not _LEAST_MODEL <= len(row) <= len(_MODEL) for row in plain
    ):
        raise WireError("PeerInfo.models: not an array of models")
    return tuple([ServedModel(*[one.load(v) for one, v in zip(_MODEL, row, strict=False)]) for row in plain])


def _json(value: Any, depth: int = 0) -> Any:
    """A JSON value as Python has it: arrays are lists here, because engines hand it on as JSON."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and isfinite(value):
        return value
    if depth < MAX_DEPTH:
        if type(value) in (tuple, list):
            return [_json(item, depth + 1) for item in value]
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: _json(item, depth + 1) for key, item in value.items()}
    raise WireError("SamplingParams: not a JSON value")


def _json_object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise WireError("SamplingParams: not a JSON object")
    found: dict[str, Any] = _json(value)
    return found


def _shapes(owner: type, **annotations: Any) -> dict[str, Shape]:
    return {name: shape(annotation, f"{owner.__name__}.{name}") for name, annotation in annotations.items()}


_INFO = _shapes(
    PeerInfo,
    name=Name,
    version=_Word,
    role=_Word,
    engine=_Word,
    engine_version=_Word,
    state=_Word,
    detail=Annotated[str, Cap(DETAIL_MAX)],
    progress=_Share,
    requests_port=U16,
    events_port=U16,
    http=Annotated[str, Cap(280)],
) | {"models": Shape(_dump_models, _load_models)}
_ROLES = (AGGREGATED, PREFILL, DECODE, FRONTEND)
_DEFAULT_INFO = PeerInfo("", "")

_Seed = Annotated[int, Bound(-(2**63), 2**64 - 1)]
_Priority = Annotated[int, Bound(-(2**31), 2**31 - 1)]
_PARAMS = _shapes(
    SamplingParams,
    max_tokens=U32,
    min_tokens=U32,
    temperature=_Positive,
    top_p=_Share,
    top_k=Annotated[int, Bound(-1, 2**31 - 1)],
    min_p=_Share,
    repetition_penalty=_Positive,
    presence_penalty=_Penalty,
    frequency_penalty=_Penalty,
    seed=_Seed | None,
    stop_token_ids=Annotated[tuple[U32, ...], Cap(4096)],
    ignore_eos=bool,
    logprobs=U32 | None,
    prompt_logprobs=U32 | None,
    priority=_Priority,
    cache_salt=Annotated[str, Cap(1024)],
    lora=Name,
) | {"guided": Shape(_json_object, _json_object), "extra": Shape(_json_object, _json_object)}


def encode_info(info: PeerInfo) -> bytes:
    """At most PEER_INFO_MAX bytes: ``detail``, a sentence for people, is shortened to fit. Raises WireError."""
    info = dataclasses.replace(info, detail=_shorten(info.detail, DETAIL_MAX))
    data = _pack_info(info)
    if len(data) > PEER_INFO_MAX and info.detail:
        room = len(info.detail.encode()) - (len(data) - PEER_INFO_MAX)
        data = _pack_info(dataclasses.replace(info, detail=_shorten(info.detail, room)))
    if len(data) > PEER_INFO_MAX:
        raise WireError(f"PeerInfo: larger than {PEER_INFO_MAX} bytes: serve fewer models or shorten their names")
    return data


def _shorten(text: str, size: int) -> str:
    """At most ``size`` UTF-8 bytes of ``text``, with an ellipsis if some are missing."""
    data = text.encode(errors="replace")
    return text if len(data) <= size else data[: max(0, size - 3)].decode(errors="ignore") + "…"


def _pack_info(info: PeerInfo) -> bytes:
    fields = {
        name: one.dump(value)
        for name, one in _INFO.items()
        if (value := getattr(info, name)) != getattr(_DEFAULT_INFO, name)
    }
    packed: bytes = msgpack.packb(fields)
    return packed


def decode_info(data: bytes) -> PeerInfo:
    """Raises WireError."""
    if len(data) > PEER_INFO_MAX:
        raise WireError(f"PeerInfo: larger than {PEER_INFO_MAX} bytes")
    info = dataclasses.replace(_DEFAULT_INFO, **_load_map(data, _INFO, "PeerInfo"))
    if info.role not in _ROLES:
        raise WireError("PeerInfo.role: unknown role")
    return info


def encode_params(params: SamplingParams) -> bytes:
    """At most PARAMS_MAX bytes. Raises WireError, for a ``guided`` schema that is too large above all."""
    fields = {name: _PARAMS[name].dump(value) for name, value in describe_params(params).items()}
    packed: bytes = msgpack.packb(fields)
    if len(packed) > PARAMS_MAX:
        raise WireError(f"SamplingParams: larger than {PARAMS_MAX} bytes")
    return packed


def decode_params(data: bytes) -> SamplingParams:
    """Raises WireError."""
    if len(data) > PARAMS_MAX:
        raise WireError(f"SamplingParams: larger than {PARAMS_MAX} bytes")
    return SamplingParams(**_load_map(data, _PARAMS, "SamplingParams"))


def _load_map(data: bytes, shapes: dict[str, Shape], name: str) -> dict[str, Any]:
    fields = unpack(data, maps=True)
    if type(fields) is not dict:
        raise WireError(f"{name}: not a map")
    if not fields.keys() <= shapes.keys():
        raise WireError(f"{name}: unknown field")
    return {field: shapes[field].load(value) for field, value in fields.items()}


def encode_logprobs(logprobs: Logprobs) -> bytes:
    """``Delta.logprobs``. Minus infinity (a banned token, in some engines) becomes -9999.0 as in OpenAI's API."""
    rows = [(max(chosen, -9999.0), [(t, max(p, -9999.0)) for t, p in tops]) for chosen, tops in logprobs]
    packed: bytes = msgpack.packb(rows)
    return packed


def decode_logprobs(data: bytes) -> Logprobs:
    """Raises WireError."""
    rows = unpack(data, maps=False)
    if type(rows) is not tuple or len(rows) > MAX_STEP_TOKENS:
        raise WireError("logprobs: not an array")
    for row in rows:
        if type(row) is not tuple or len(row) != 2 or not _is_logprob(row[0]) or type(row[1]) is not tuple:
            raise WireError("logprobs: not [chosen, [[id, logprob], ...]]")
        for top in row[1]:
            if type(top) is not tuple or len(top) != 2 or not _is_logprob(top[1]):
                raise WireError("logprobs: not [id, logprob]")
            if type(top[0]) is not int or not 0 <= top[0] < 2**32:
                raise WireError("logprobs: not a token id")
    found: Logprobs = rows
    return found


def _is_logprob(value: Any) -> bool:
    return type(value) is float and isfinite(value)
