"""What the parts of one membership core share: time, chance, members, news, and the actions of the event in hand."""

from __future__ import annotations

import random

from p2pdyn.core.actions import Action, MemberChanged, Send
from p2pdyn.core.awareness import Awareness
from p2pdyn.core.membership_config import MembershipConfig
from p2pdyn.core.membership_roster import Member, Roster
from p2pdyn.core.timers import Timers
from p2pdyn.core.types import Address


class Context:
    """``now`` is the caller's clock; ``running`` the time this process ran, pauses subtracted: timers use it."""

    def __init__(self, local: Member, config: MembershipConfig, rng: random.Random) -> None:
        self.config = config
        self.rng = rng
        self.timers = Timers()
        self.roster = Roster(local, rng, config.rings)
        self.awareness = Awareness(config.awareness)
        self.actions: list[Action] = []
        self.now = 0.0
        self.running = 0.0
        self._seq = rng.randrange(2**32)

    def send(self, to: Address, message: object) -> None:
        self.actions.append(Send(to, message))

    def put(self, member: Member) -> None:
        """Change a member in the roster and say so."""
        was = self.roster.put(member)
        self.actions.append(MemberChanged(member, was.state if was else None))

    def arm(self, delay: float, kind: str, subject: object = None) -> None:
        self.timers.arm(self.running + delay, kind, subject)

    def arm_at(self, at: float, kind: str, subject: object = None) -> None:
        """Arm for a time of the ``running`` clock; one gone by means now (in the past it would look like a pause)."""
        self.timers.arm(max(at, self.running), kind, subject)

    def number(self) -> int:
        """A fresh message number: u32, from a random start, so that a former life's answers do not match."""
        self._seq = (self._seq + 1) % 2**32
        return self._seq
