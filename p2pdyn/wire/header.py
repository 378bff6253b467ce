"""The control link's envelope and admin commands: kinds below 16.

Every control message is two frames, a :class:`Header` and the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from p2pdyn.wire.schema import CONTROL, U32, U64, Cap, IdStr, Name, Sentence, message

ADMIN_PAGE = 48 * 1024
"""Bytes of an admin answer in one message; the rest of CONTROL_MAX is room for what is around it."""
ADMIN_PAGES = 512


@message(CONTROL, 1)
@dataclass(frozen=True, slots=True)
class Header:
    """Who sends. ``cluster`` and ``node`` are empty from an admin client, which is no peer.

    ``wall_ms`` is the sender's wall clock in ms since 1970, from which the receiver estimates the difference.
    """

    cluster: Name
    node: IdStr
    epoch: U64
    wall_ms: U64


@message(CONTROL, 2)
@dataclass(frozen=True, slots=True)
class Foreign:
    """Answer to a peer of another cluster, so that it can tell its user; the header names this one's."""


@message(CONTROL, 3)
@dataclass(frozen=True, slots=True)
class AdminCall:
    """Do ``op``. ``args`` is a JSON object; ``ticket`` is the caller's and comes back with each page."""

    ticket: U32
    op: Annotated[str, Cap(32)]
    args: Annotated[bytes, Cap(ADMIN_PAGE)]


@message(CONTROL, 4)
@dataclass(frozen=True, slots=True)
class AdminPage:
    """One page of an answer, which is ``pages`` pages of JSON, in order. ``error`` is a sentence, or empty."""

    ticket: U32
    page: U32
    pages: U32
    error: Sentence
    data: Annotated[bytes, Cap(ADMIN_PAGE)]
