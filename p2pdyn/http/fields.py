"""Small strict validators for request fields: the value comes back as it will be used, or HttpError 400 says why not.

JSON's true is no number here, a float with an integral value is no integer, and null is the same as absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from p2pdyn.http.errors import bad

Check = Callable[[Any, str], Any]


def integer(low: int, high: int) -> Check:
    def check(value: Any, name: str) -> int:
        if type(value) is not int:
            raise bad(f"{name} must be an integer.", name, "invalid_type")
        if not low <= value <= high:
            raise bad(f"{name} must be from {low} to {high}.", name)
        return value

    return check


def number(low: float, high: float, above: bool = False) -> Check:
    """``above``: the low end itself is not allowed."""

    def check(value: Any, name: str) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise bad(f"{name} must be a number.", name, "invalid_type")
        if not low <= value <= high or (above and value == low):
            raise bad(
                f"{name} must be {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}.", name
            )
        return float(value)

    return check


def boolean(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise bad(f"{name} must be true or false.", name, "invalid_type")
    return value


def text(longest: int, shortest: int = 1) -> Check:
    def check(value: Any, name: str) -> str:
        if type(value) is not str:
            raise bad(f"{name} must be a string.", name, "invalid_type")
        if not shortest <= len(value) <= longest:
            raise bad(f"{name} must have from {shortest} to {longest} characters.", name)
        return value

    return check


def mapping(value: Any, name: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise bad(f"{name} must be an object.", name, "invalid_type")
    return value


def items(of: Check, most: int, least: int = 0) -> Check:
    def check(value: Any, name: str) -> list[Any]:
        if type(value) is not list:
            raise bad(f"{name} must be a list.", name, "invalid_type")
        if not least <= len(value) <= most:
            raise bad(f"{name} must have from {least} to {most} items.", name)
        return [of(item, f"{name}[{index}]") for index, item in enumerate(value)]

    return check


def one_or_more(of: Check, most: int) -> Check:
    """A value or a list of them; always a list afterwards."""
    several = items(of, most)

    def check(value: Any, name: str) -> list[Any]:
        return several(value, name) if type(value) is list else [of(value, name)]

    return check


def neutral(*allowed: Any, because: str) -> Check:
    """For a field that is not supported: only values that ask for nothing pass."""

    def check(value: Any, name: str) -> None:
        if not any(value == harmless and type(value) is type(harmless) for harmless in allowed):
            raise bad(f"{name} is not supported: {because}.", name, "unsupported_parameter")

    return check


def ignored(value: Any, name: str) -> None:
    """A field without influence on the answer."""


def checked(content: Mapping[str, Any], table: Mapping[str, Check], where: str = "") -> dict[str, Any]:
    """The given fields, each checked; an unknown one is refused, because ignoring it could change the meaning."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        check = table.get(name)
        if check is None:
            raise bad(f"Unknown field {where}{name[:64]!r}: leave it out.", where + name[:64], "unknown_field")
        if value is not None:
            found[name] = check(value, where + name)
    return found
