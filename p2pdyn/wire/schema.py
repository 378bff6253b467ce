"""How a message is declared, so that one strict codec serves all.

A message is a frozen, slotted dataclass decorated with :func:`message`; the codec sends its fields as one positional
msgpack array ``[kind, field, field, ...]`` behind the version byte.  Field types are ``int`` (0 .. 2**64-1 unless a
:class:`Bound` says otherwise), ``float`` (finite), ``bool``, ``str``, ``bytes``, ``T | None``, ``tuple[T, ...]``,
``tuple[A, B]`` and other dataclasses or NamedTuples (nested arrays).  ``str``, ``bytes`` and ``tuple[T, ...]`` must
carry a :class:`Cap`: ``Annotated[str, Cap(64)]``.  Anything else does not decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from p2pdyn.core.types import MAX_HOST


@dataclass(frozen=True, slots=True)
class Cap:
    """Longest allowed: UTF-8 bytes of a str, bytes of a bytes, items of a tuple."""

    size: int


@dataclass(frozen=True, slots=True)
class Bound:
    """Allowed range of a number, both ends included."""

    low: float
    high: float


U8 = Annotated[int, Bound(0, 2**8 - 1)]
U16 = Annotated[int, Bound(0, 2**16 - 1)]
U32 = Annotated[int, Bound(0, 2**32 - 1)]
U64 = Annotated[int, Bound(0, 2**64 - 1)]
I64 = Annotated[int, Bound(-(2**63), 2**63 - 1)]
IdStr = Annotated[str, Cap(16)]
Name = Annotated[str, Cap(128)]
Host = Annotated[str, Cap(MAX_HOST)]
Sentence = Annotated[str, Cap(512)]

T = TypeVar("T")

CONTROL = "control"
REQUESTS = "requests"
EVENTS = "events"
TRANSFER = "transfer"

REGISTRY: dict[str, dict[int, type]] = {CONTROL: {}, REQUESTS: {}, EVENTS: {}, TRANSFER: {}}


def message(link: str, kind: int) -> Callable[[type[T]], type[T]]:
    """Register a dataclass as message ``kind`` of ``link``; two of one kind are a programming error."""

    def register(cls: type[T]) -> type[T]:
        kinds = REGISTRY[link]
        if kind in kinds:
            raise ValueError(f"{link} message kind {kind} is taken by {kinds[kind].__name__}")
        kinds[kind] = cls
        cls.KIND = kind  # type: ignore[attr-defined]
        return cls

    return register
