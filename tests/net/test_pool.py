"""The control link's outgoing connections: opened when needed, bounded, closed when idle, broken or suspect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from p2pdyn.constants import CONTROL_MAX
from p2pdyn.core.types import Address, NodeId
from p2pdyn.net import pool as pool_module
from p2pdyn.net.clocks import LoopLag, WallClocks
from p2pdyn.net.complaints import MAX_SOURCES, Complaints
from p2pdyn.net.curve import Security
from p2pdyn.net.link import Link
from p2pdyn.net.pool import MAX_WAITING, Pool
from p2pdyn.net.sockets import Sockets


class Room:
    """A pool and as many echoing ROUTERs as asked for."""

    def __init__(self) -> None:
        self.sockets = Sockets(Security.insecure())
        self.answers: list[tuple[Address, list[bytes]]] = []
        self.downs: list[Address] = []
        self.pool = Pool(
            self.sockets,
            lambda address, frames: self.answers.append((address, frames)),
            lambda a, _: self.downs.append(a),
        )
        self.connections: dict[Address, set[bytes]] = {}
        self.heard = 0

    def listen(self, port: int = 0) -> tuple[Address, Link]:
        def receive(frames: list[bytes]) -> None:
            self.heard += 1
            self.connections[link.addresses[0]].add(frames[0])
            link.send(frames)

        link = self.sockets.router([Address("127.0.0.1", port)], receive, max_size=CONTROL_MAX)
        self.connections.setdefault(link.addresses[0], set())
        return link.addresses[0], link

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110  # what it waits for happens in ZeroMQ's threads
                await asyncio.sleep(0.005)


def run(body: Callable[[Room], Awaitable[None]]) -> None:
    async def main() -> None:
        room = Room()
        try:
            await body(room)
        finally:
            room.pool.close()
            room.sockets.close()

    uvloop.run(main())


def test_messages_wait_for_the_connection_and_share_it() -> None:
    async def body(room: Room) -> None:
        address, _ = room.listen()
        for number in range(3):
            room.pool.send(address, (b"h", b"%d" % number))
        await room.until(lambda: len(room.answers) == 3)
        assert room.answers == [(address, [b"h", b"%d" % number]) for number in range(3)]
        room.pool.send(address, (b"h", b"3"))
        await room.until(lambda: len(room.answers) == 4)
        assert len(room.connections[address]) == len(room.pool) == 1

    run(body)


def test_only_the_newest_messages_wait_and_a_broken_connection_is_reported_once() -> None:
    async def body(room: Room) -> None:
        address, link = room.listen()
        link.close()
        for number in range(100):
            room.pool.send(address, (b"h", b"%d" % number))
        await room.until(lambda: room.downs)
        assert room.downs == [address]
        assert len(room.pool) == 0
        room.listen(address.port)
        for number in range(100):
            room.pool.send(address, (b"h", b"%d" % number))
        await room.until(lambda: len(room.answers) == MAX_WAITING)
        assert [int(frames[1]) for _, frames in room.answers] == list(range(100 - MAX_WAITING, 100))

    run(body)


def test_a_dropped_connection_is_not_used_again() -> None:
    async def body(room: Room) -> None:
        address, _ = room.listen()
        room.pool.send(address, (b"h", b"1"))
        await room.until(lambda: room.answers)
        room.pool.drop(address)
        room.pool.drop(address)
        room.pool.send(address, (b"h", b"2"))
        await room.until(lambda: len(room.answers) == 2)
        assert len(room.connections[address]) == 2
        assert room.downs == []

    run(body)


def test_open_connections_are_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_LINKS", 3)

    async def body(room: Room) -> None:
        addresses = [room.listen()[0] for _ in range(4)]
        for address in addresses[:3]:
            room.pool.send(address, (b"h", b"x"))
        await room.until(lambda: room.heard == 3)
        room.pool.send(addresses[0], (b"h", b"x"))
        room.pool.send(addresses[3], (b"h", b"x"))
        await room.until(lambda: room.heard == 5)
        assert len(room.pool) == 3
        for address in (addresses[0], addresses[1]):  # the first was kept, the second had to go
            room.pool.send(address, (b"h", b"x"))
        await room.until(lambda: room.heard == 7)
        assert [len(room.connections[address]) for address in addresses] == [1, 2, 1, 1]

    run(body)


def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "CONTROL_IDLE_S", 0.2)

    async def body(room: Room) -> None:
        address, _ = room.listen()
        room.pool.send(address, (b"h", b"x"))
        await room.until(lambda: room.heard == 1)
        await room.until(lambda: len(room.pool) == 0)
        assert room.downs == []

    run(body)


def test_a_complaint_is_logged_once_a_source_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            complaints.add("garbage", "1.2.3.4", "noise from 1.2.3.4")
        complaints.add("garbage", "5.6.7.8", "noise from 5.6.7.8")
        complaints.add("refused", "1.2.3.4", "refused 1.2.3.4")
    assert [record.message for record in caplog.records] == [
        "noise from 1.2.3.4",
        "noise from 5.6.7.8",
        "refused 1.2.3.4",
    ]
    assert complaints.counts == {"garbage": 6, "refused": 1}
    assert complaints.by_source("garbage") == {"1.2.3.4": 5, "5.6.7.8": 1}
    for number in range(2 * MAX_SOURCES):
        complaints.add("flood", str(number), "x")
    assert len(complaints.by_source("flood")) <= MAX_SOURCES


def test_the_least_delayed_message_tells_the_clocks_difference() -> None:
    clocks, node = WallClocks(), NodeId("a" * 16)
    assert clocks.ahead(node) is None
    for delay in (0.3, 0.01, 0.5):  # the other clock is 2 s ahead
        clocks.seen(node, 102_000, 100.0 + delay, 0.0)
    assert clocks.ahead(node) == pytest.approx(1.99)
    clocks.seen(node, 100_000, 100.01, 61.0)  # set right meanwhile
    assert clocks.ahead(node) == pytest.approx(-0.01)
    clocks.forget(node)
    assert clocks.ahead(node) is None


def test_the_loops_worst_lag_is_kept_for_a_minute() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        lag = LoopLag(loop)
        try:
            end = loop.time() + 0.4
            while loop.time() < end:  # hold the loop up, as a bug would
                pass
            await asyncio.sleep(0.3)
            assert 0.25 < lag.seconds < 5
        finally:
            lag.close()

    asyncio.run(main())
