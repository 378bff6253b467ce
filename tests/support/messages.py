"""Values and messages that a schema allows, made from the same annotations as the codec."""

from __future__ import annotations

import dataclasses
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from p2pdyn.core.types import PeerInfo, SamplingParams, ServedModel
from p2pdyn.wire import control, events, header, requests, transfer  # noqa: F401  # register their messages
from p2pdyn.wire.schema import REGISTRY, Bound, Cap

SMALL = 12
"""Longest text or array made here; the caps have tests of their own."""


def registered() -> list[tuple[str, type]]:
    return [(link, cls) for link, kinds in REGISTRY.items() for cls in kinds.values()]


def value(annotation: Any) -> st.SearchStrategy[Any]:
    cap, bound = SMALL, Bound(0, 2**64 - 1)
    floats = st.floats(allow_nan=False, allow_infinity=False)
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        for extra in extras:
            cap = min(cap, extra.size) if isinstance(extra, Cap) else cap
            if isinstance(extra, Bound):
                bound = extra
                floats = st.floats(extra.low, extra.high)
    if annotation is int:
        return st.integers(int(bound.low), int(bound.high))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        float: floats,
        bool: st.booleans(),
        bytes: st.binary(max_size=cap),
        str: st.text(max_size=cap // 4),
    }
    if annotation in plain:
        return plain[annotation]
    if get_origin(annotation) in (Union, UnionType):
        return st.none() | value(next(kind for kind in get_args(annotation) if kind is not NoneType))
    if get_origin(annotation) is tuple:
        kinds = get_args(annotation)
        if kinds[-1] is Ellipsis:
            return st.lists(value(kinds[0]), max_size=min(cap, 5)).map(tuple)
        return st.tuples(*map(value, kinds))
    return record(annotation)


def record(cls: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls, include_extras=True)
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else cls._fields  # type: ignore[attr-defined]
    fields = {name: value(hints[name]) for name in names}
    if cls is requests.Delta:
        fields["finish"] = st.sampled_from(requests.FINISHES)
    return st.builds(cls, **fields)


messages = st.sampled_from(registered()).flatmap(lambda known: st.tuples(st.just(known[0]), record(known[1])))

_word = st.text(max_size=16)
_u16, _u32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | _word,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_word, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(_word, json_values, max_size=3)

infos = st.builds(
    PeerInfo,
    name=_word,
    version=_word,
    role=st.sampled_from(["aggregated", "prefill", "decode", "frontend"]),
    engine=_word,
    state=_word,
    detail=st.text(max_size=40),
    progress=st.floats(0, 1),
    models=st.lists(
        st.builds(ServedModel, _word, _word, _word, _u32, _u32, st.integers(1, 256), st.booleans(), _word), max_size=2
    ).map(tuple),
    requests_port=_u16,
    events_port=_u16,
    http=_word,
)

params = st.builds(
    SamplingParams,
    max_tokens=_u32,
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1),
    top_k=st.integers(-1, 1000),
    presence_penalty=st.floats(-2, 2),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop_token_ids=st.lists(_u32, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    guided=st.none() | json_objects,
    priority=st.integers(-100, 100),
    lora=_word,
    extra=json_objects,
)
