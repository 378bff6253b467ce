"""Constants of the membership protocol: unit, reason, bound."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """Filled in with the core."""
