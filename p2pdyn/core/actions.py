"""What the membership core asks of its shell. Shells carry these out in order and decide nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pdyn.core.types import Address

if TYPE_CHECKING:
    from p2pdyn.core.membership_roster import Member


@dataclass(frozen=True, slots=True)
class Send:
    """Send a control message on our own DEALER to ``to``, opening it if need be. It may be lost."""

    to: Address
    message: object


@dataclass(frozen=True, slots=True)
class Reply:
    """Send a control message back on the connection that ``to`` (``Received.reply``) names."""

    to: object
    message: object


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A member's state, version, address or info changed. ``was`` is its state before, None for a new member."""

    member: Member
    was: str | None


@dataclass(frozen=True, slots=True)
class Alarm:
    """A condition that people should see for ``for_s`` seconds; 0 ends the alarm of this ``kind``.

    Kinds: ``duplicate-id``, ``address-conflict``, ``isolated``.
    """

    kind: str
    text: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Fatal:
    """This node must not serve: log the sentence and exit 1. The core does nothing after it."""

    text: str


Action = Send | Reply | MemberChanged | Alarm | Fatal
