"""News waiting to ride on other messages: each record leaves a limited number of times, least-sent first."""

from __future__ import annotations

import math
from collections.abc import Iterable

from p2pdyn.core.types import NodeId
from p2pdyn.wire.control import Record

RECORD_OVERHEAD = 66
"""Bytes: upper bound of an encoded record without host and info (two ids of 17, three numbers of up to 9, lengths)."""


def record_size(record: Record) -> int:
    return RECORD_OVERHEAD + len(record.host) + len(record.info)


def retransmit_limit(factor: float, nodes: int) -> int:
    """How often a node sends one record: with r sends a node, about N * exp(-r) nodes hear nothing."""
    return max(1, math.ceil(factor * math.log(nodes + 1)))


class _Item:
    __slots__ = ("record", "sent", "serial", "size")

    def __init__(self, record: Record, serial: int) -> None:
        self.record = record
        self.serial = serial
        self.sent = 0
        self.size = record_size(record)


class Broadcasts:
    """One record a member: a newer one replaces what waits. Callers only put what their own view took as news."""

    def __init__(self) -> None:
        self._items: dict[str, _Item] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, record: Record) -> None:
        self._serial += 1
        self._items[record.id] = _Item(record, self._serial)

    def get(self, node: NodeId) -> Record | None:
        item = self._items.get(node)
        return item.record if item else None

    def take(self, room: int, limit: int, copies: int = 1) -> tuple[Record, ...]:
        """Records that fit into ``room`` bytes, now sent ``copies`` times more; done after ``limit``."""
        if not self._items:
            return ()
        taken: list[Record] = []
        for item in self._order():
            if item.size > room:
                continue
            room -= item.size
            taken.append(item.record)
            item.sent += copies
            if item.sent >= limit:
                del self._items[item.record.id]
            if room < RECORD_OVERHEAD:
                break
        return tuple(taken)

    def _order(self) -> Iterable[_Item]:
        if len(self._items) == 1:
            return list(self._items.values())
        return sorted(self._items.values(), key=lambda item: (item.sent, -item.serial))
