"""JSON bodies whose parsing takes bounded time and memory.

A parser makes an object of some 60 bytes from two bytes (``[]``), and holds up the loop meanwhile: 28 MB of those took
9 s and 1 GB.  So of a larger body strings, lists and objects, and values are counted first, at the speed of memory.
"""

from __future__ import annotations

from typing import Any

import orjson

from p2pdyn.http.errors import HttpError, bad

UNCOUNTED = 64 * 1024
"""Bytes: the worst body of this size is parsed in some 20 ms."""
MAX_STRINGS = 2**17
MAX_CONTAINERS = 2**16
"""Lists and objects: 4096 messages with parts, a schema."""
MAX_VALUES = 2**22
"""Token ids of the longest prompts; 200 ms."""

_KEPT = b'"[{,'
_DROPPED = bytes(set(range(256)) - set(_KEPT))


def load_object(body: bytes | bytearray) -> dict[str, Any]:
    """Raises HttpError 400, or 413 for a body that holds too much."""
    if len(body) > UNCOUNTED:
        _count(body)
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if type(content) is not dict:
        raise bad("The body must be a JSON object.", code="invalid_type")
    found: dict[str, Any] = content
    return found


def _count(body: bytes | bytearray) -> None:
    """What this takes for the bounds of strings is so in valid JSON; anything else the parser refuses soon."""
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in body else body
    kept = unescaped.translate(None, _DROPPED)
    if kept.count(b'"') > 2 * MAX_STRINGS:
        raise _too_much(MAX_STRINGS, "strings")
    outside = b"".join(kept.split(b'"')[::2])
    if outside.count(b"[") + outside.count(b"{") > MAX_CONTAINERS:
        raise _too_much(MAX_CONTAINERS, "lists and objects")
    if outside.count(b",") > MAX_VALUES:
        raise _too_much(MAX_VALUES, "values")


def _too_much(most: int, what: str) -> HttpError:
    return HttpError(413, f"The body holds more than {most} {what}; send fewer.", "body_too_large")
