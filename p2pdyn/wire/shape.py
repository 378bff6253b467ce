"""Compile a field's annotation into a pair of strict converters, once.

``dump`` turns a value into what msgpack packs, ``load`` turns what msgpack unpacked into a value.  Both check
everything that :mod:`p2pdyn.wire.schema` promises and raise :class:`WireError` naming the field, so that a sender
learns of its own mistake instead of the receiver dropping the message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import isfinite
from operator import attrgetter
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from p2pdyn.wire.schema import Bound, Cap

Convert = Callable[[Any], Any]

_U64 = Bound(0, 2**64 - 1)


class WireError(ValueError):
    """A message that does not follow its schema. ``reason`` is short and quotes nothing that a peer sent."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Shape(NamedTuple):
    """How one type travels."""

    dump: Convert
    load: Convert


def record_shape(cls: type, name: str = "") -> Shape:
    """The shape of a dataclass or NamedTuple: a positional array of its fields. Those at the end that have their
    defaults are left out, and read as such: a message of before they were added is a message still."""
    name = name or cls.__name__
    names, shapes = field_names(cls), field_shapes(cls, name)
    fields = _reader(names)
    dumps = [s.dump for s in shapes]
    loads = [s.load for s in shapes]
    count = len(shapes)
    defaults = _last_defaults(cls)
    least = count - len(defaults)

    def dump(value: Any) -> Any:
        if type(value) is not cls:
            raise WireError(f"{name}: not a {cls.__name__}")
        values = fields(value)
        end = count
        while end > least and values[end - 1] == defaults[count - end]:
            end -= 1
        return [convert(one) for convert, one in zip(dumps, values[:end], strict=False)]

    def load(plain: Any) -> Any:
        if type(plain) is not tuple or not least <= len(plain) <= count:
            raise WireError(f"{name}: not an array of {count} fields")
        return cls(*[convert(item) for convert, item in zip(loads, plain, strict=False)])

    return Shape(dump, load)


def _reader(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """What takes all these attributes in one call."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple([getattr(value, name) for name in names])


def field_names(cls: type) -> tuple[str, ...]:
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    names: tuple[str, ...] = cls._fields  # type: ignore[attr-defined]
    return names


def _last_defaults(cls: type) -> list[Any]:
    """The defaults of a dataclass's fields, from the last one back to the first one that has none."""
    if not dataclasses.is_dataclass(cls):
        return []
    backwards = [field.default for field in reversed(dataclasses.fields(cls))]
    return backwards[: next((i for i, value in enumerate(backwards) if value is dataclasses.MISSING), len(backwards))]


def field_shapes(cls: type, name: str = "") -> list[Shape]:
    """The shapes of a dataclass's or NamedTuple's fields, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return [shape(hints[field], f"{name or cls.__name__}.{field}") for field in field_names(cls)]


def shape(annotation: Any, name: str) -> Shape:
    """The shape of one field. Raises TypeError for an annotation that the schema does not know."""
    cap, bound = None, None
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        cap = next((e.size for e in extras if isinstance(e, Cap)), None)
        bound = next((e for e in extras if isinstance(e, Bound)), None)
    if annotation is int:
        return _same(_int_check(bound or _U64, name))
    if annotation is float:
        return _float_shape(bound, name)
    if annotation is bool:
        return _same(_bool_check(name))
    if get_origin(annotation) in (Union, UnionType):
        return _optional_shape(annotation, name)
    if dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields"):
        return record_shape(annotation, name)
    if get_origin(annotation) is tuple and get_args(annotation)[-1] is not Ellipsis:
        return _pair_shape(get_args(annotation), name)
    if cap is None:
        raise TypeError(f"{name}: {annotation} needs a Cap or is not a type of the wire")
    if annotation is str:
        return _same(_str_check(cap, name))
    if annotation is bytes:
        return _same(_bytes_check(cap, name))
    if get_origin(annotation) is tuple:
        return _array_shape(get_args(annotation)[0], cap, name)
    raise TypeError(f"{name}: {annotation} is not a type of the wire")


def _same(check: Convert) -> Shape:
    return Shape(check, check)


def _int_check(bound: Bound, name: str) -> Convert:
    low, high = int(bound.low), int(bound.high)

    def check(value: Any) -> int:
        if type(value) is not int:  # not isinstance: a bool is no number here
            raise WireError(f"{name}: not an integer")
        if not low <= value <= high:
            raise WireError(f"{name}: not in {low}..{high}")
        return value

    return check


def _float_shape(bound: Bound | None, name: str) -> Shape:
    low, high = (bound.low, bound.high) if bound else (float("-inf"), float("inf"))

    def load(value: Any) -> float:
        if type(value) is not float or not isfinite(value):
            raise WireError(f"{name}: not a finite float")
        if not low <= value <= high:
            raise WireError(f"{name}: not in {low}..{high}")
        return value

    def dump(value: Any) -> float:
        return load(float(value) if type(value) is int else value)

    return Shape(dump, load)


def _bool_check(name: str) -> Convert:
    def check(value: Any) -> bool:
        if type(value) is not bool:
            raise WireError(f"{name}: not a boolean")
        return value

    return check


def _str_check(cap: int, name: str) -> Convert:
    def check(value: Any) -> str:
        if type(value) is not str:
            raise WireError(f"{name}: not a string")
        try:
            size = len(value) if value.isascii() else len(value.encode())
        except UnicodeEncodeError:
            raise WireError(f"{name}: not Unicode text") from None
        if size > cap:
            raise WireError(f"{name}: longer than {cap} bytes")
        return value

    return check


def _bytes_check(cap: int, name: str) -> Convert:
    def check(value: Any) -> bytes:
        if type(value) is not bytes:
            raise WireError(f"{name}: not bytes")
        if len(value) > cap:
            raise WireError(f"{name}: longer than {cap} bytes")
        return value

    return check


def _optional_shape(annotation: Any, name: str) -> Shape:
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    if len(kinds) != 1 or len(get_args(annotation)) != 2:
        raise TypeError(f"{name}: the only union of the wire is T | None")
    some = shape(kinds[0], name)
    return Shape(
        lambda value: None if value is None else some.dump(value),
        lambda plain: None if plain is None else some.load(plain),
    )


def _pair_shape(kinds: tuple[Any, ...], name: str) -> Shape:
    shapes = [shape(kind, f"{name}[{i}]") for i, kind in enumerate(kinds)]

    def through(converts: list[Convert]) -> Convert:
        def convert(value: Any) -> tuple[Any, ...]:
            if type(value) is not tuple or len(value) != len(converts):
                raise WireError(f"{name}: not a tuple of {len(converts)}")
            return tuple([c(item) for c, item in zip(converts, value, strict=True)])

        return convert

    return Shape(through([s.dump for s in shapes]), through([s.load for s in shapes]))


def _array_shape(kind: Any, cap: int, name: str) -> Shape:
    item = shape(kind, f"{name}[]")
    if get_origin(kind) is Annotated and get_args(kind)[0] is int:
        return _same(_ints_check(item.load, cap, name))

    def through(each: Convert) -> Convert:
        def convert(value: Any) -> tuple[Any, ...]:
            if type(value) is not tuple:
                raise WireError(f"{name}: not a tuple")
            if len(value) > cap:
                raise WireError(f"{name}: more than {cap} items")
            return tuple([each(x) for x in value])

        return convert

    return Shape(through(item.dump), through(item.load))


def _ints_check(one: Convert, cap: int, name: str) -> Convert:
    """Arrays of integers may be long (rids, token ids): check their types and extremes, not each."""

    def check(value: Any) -> tuple[int, ...]:
        if type(value) is not tuple:
            raise WireError(f"{name}: not a tuple")
        if len(value) > cap:
            raise WireError(f"{name}: more than {cap} items")
        if value:
            if set(map(type, value)) != {int}:
                raise WireError(f"{name}[]: not an integer")
            one(min(value))
            one(max(value))
        return value

    return check
