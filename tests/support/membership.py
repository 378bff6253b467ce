"""A membership core of one node with its neighbours played by the test."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from p2pdyn.core.actions import Action, MemberChanged, Reply, Send
from p2pdyn.core.events import Event, Received, Tick
from p2pdyn.core.membership import Member, Membership, MembershipConfig
from p2pdyn.core.membership_roster import ALIVE, CODES
from p2pdyn.core.types import Address, NodeId, Version
from p2pdyn.wire.control import Ack, Gossip, Ping, Record

EPOCH = 1_000


def node_id(index: int) -> NodeId:
    return NodeId(f"{index:016x}")


def address(index: int) -> Address:
    return Address(f"10.0.0.{index}", 7400)


def member(index: int, incarnation: int = 0, epoch: int = EPOCH, info: bytes = b"info") -> Member:
    return Member(node_id(index), Version(epoch, incarnation), address(index), ALIVE, info)


def record(index: int, state: str = ALIVE, incarnation: int = 0, epoch: int = EPOCH, **changes: Any) -> Record:
    """Whole if alive, a rumour else; ``changes`` override fields."""
    whole = state == ALIVE
    where = (address(index).host, 7400, b"info") if whole else ("", 0, b"")
    made = Record(node_id(index), epoch, incarnation, CODES[state], "", *where, 0)
    return replace(made, **changes)


class Peer:
    """Node 0 at time 0, knowing the others; drive it and look at what it does."""

    def __init__(self, others: int = 3, config: MembershipConfig | None = None) -> None:
        self.config = config or MembershipConfig()
        self.core = Membership(member(0), self.config, random.Random(7))
        self.core.preload(member(i) for i in range(1, others + 1))
        self.now = 0.0
        self.actions: list[Action] = []
        self.do(Tick())

    def do(self, event: Event, now: float | None = None) -> list[Action]:
        """Handle one event; the actions of this event alone."""
        self.now = self.now if now is None else now
        actions = self.core.handle(event, self.now)
        self.actions += actions
        self.core.check()
        return actions

    def hear(self, *records: Record, source: int = 1) -> list[Action]:
        return self.do(Received(Gossip(records), None, node_id(source)))

    def ask(self, message: object, source: int = 1) -> list[Action]:
        """A question, and only the answers to it."""
        return [a.message for a in self.do(Received(message, "link", node_id(source))) if isinstance(a, Reply)]

    def answer(self, message: object, source: int = 1) -> list[Action]:
        return self.do(Received(message, None, node_id(source)))

    def run(self, seconds: float, answering: Iterable[int] = ()) -> list[Action]:
        """Let time pass; peers in ``answering`` acknowledge each Ping at once, and refute the accusation on it."""
        alive, until, done = set(answering), self.now + seconds, []
        while (due := self.core.next_deadline()) is not None and due <= until:
            new = self.do(Tick(), max(due, self.now))
            done += new
            for action in new:
                if isinstance(action, Send) and isinstance(action.message, Ping):
                    index = int(action.message.target, 16)
                    accused = [r.incarnation for r in action.message.updates if r.id == node_id(index) and r.state]
                    if index in alive and action.to == address(index):
                        updates = tuple(record(index, incarnation=i + 1) for i in accused)
                        done += self.answer(Ack(action.message.seq, node_id(index), EPOCH, updates), index)
        self.now = until
        return done

    def state(self, index: int) -> str | None:
        known = self.core.members.get(node_id(index))
        return known.state if known else None

    def incarnation(self, index: int) -> int:
        return self.core.members[node_id(index)].version.incarnation


def changes(actions: Iterable[Action]) -> list[tuple[str, str | None, str]]:
    """(id's last digits, state before, state) of each MemberChanged."""
    return [(a.member.id[-2:], a.was, a.member.state) for a in actions if isinstance(a, MemberChanged)]


def sent(actions: Iterable[Action], kind: type) -> list[tuple[Address, Any]]:
    return [(a.to, a.message) for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


def told(actions: Iterable[Action]) -> list[Record]:
    """All records in Gossip messages."""
    return [record for _, message in sent(actions, Gossip) for record in message.updates]
