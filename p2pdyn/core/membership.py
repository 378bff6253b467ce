"""SWIM membership with Lifeguard, digest synchronisation and healing, without IO."""

from __future__ import annotations

import random
from collections.abc import Mapping

from p2pdyn.core.actions import Action
from p2pdyn.core.events import Event
from p2pdyn.core.membership_config import MembershipConfig
from p2pdyn.core.membership_roster import Member
from p2pdyn.core.types import NodeId


class Membership:
    def __init__(self, local: Member, config: MembershipConfig, rng: random.Random) -> None:
        self._local = local

    @property
    def local(self) -> Member:
        """This node's own record. Its epoch rises above the boot epoch if a newer life of the same id was seen."""
        return self._local

    @property
    def members(self) -> Mapping[NodeId, Member]:
        """All known members, this node included."""
        return {self._local.id: self._local}

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at ``now`` (monotonic seconds, never going back) and say what to do."""
        return []

    def next_deadline(self) -> float | None:
        """When the core wants a Tick at the latest; None: never. Valid until the next ``handle``."""
        return None
