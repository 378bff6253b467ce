"""Strangers at a bound socket: each is turned away, counted and named, and many of them take little."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
import uvloop
import zmq
from support.zmtp import HANDSHAKES, call, greeting, knock, record_handshake

from p2pdyn.core.types import Address
from p2pdyn.net import doorman, sockets
from p2pdyn.net.curve import Keypair, Security
from p2pdyn.net.link import Link
from p2pdyn.net.sockets import Sockets

KEY, OTHER = Keypair(*zmq.curve_keypair()), Keypair(*zmq.curve_keypair())
SIZE = 1 << 20


class Served:
    """A router with a key that echoes, and what it received."""

    def __init__(self) -> None:
        self.sockets = Sockets(Security((KEY,)))
        self.got: list[list[bytes]] = []
        self.router: Link = self.sockets.router([Address("127.0.0.1", 0)], self._echo, max_size=SIZE)
        self.where = ("127.0.0.1", self.router.addresses[0].port)
        self.counts = self.sockets.complaints.counts

    def _echo(self, frames: list[bytes]) -> None:
        self.got.append(frames)
        self.router.send(frames)

    async def member_is_served(self) -> None:
        back: list[list[bytes]] = []
        link = self.sockets.dealer(self.router.addresses[0], back.append, max_size=SIZE)
        await until(lambda: link.send([b"hi"]))
        await until(lambda: back)
        link.close()


@asynccontextmanager
async def served() -> AsyncIterator[Served]:
    one = Served()
    try:
        async with asyncio.timeout(40):
            yield one
    finally:
        one.sockets.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(15):
        while not condition():  # noqa: ASYNC110  # what it waits for happens in ZeroMQ's threads
            await asyncio.sleep(0.005)


def test_every_malformed_handshake_is_hung_up_on_and_counted() -> None:
    async def main() -> None:
        async with served() as at:
            for name, data in HANDSHAKES.items():
                before = at.counts.total()
                assert await asyncio.to_thread(knock, at.where, data()) == "closed", name
                await until(lambda before=before: at.counts.total() > before)  # type: ignore[misc]
            assert at.counts["refused-key"] + at.counts["bad-handshake"] == len(HANDSHAKES)
            # A connection that is gone when its turn comes has no name any more.
            assert at.sockets.complaints.by_source("bad-handshake").keys() <= {"127.0.0.1", "somebody"}
            assert not at.got
            await at.member_is_served()

    uvloop.run(main())


@pytest.mark.parametrize(
    ("server", "own"), [(None, None), (OTHER, OTHER), (KEY, OTHER)], ids=["no key", "another", "public half only"]
)
def test_a_client_without_the_key_is_never_let_in(server: Keypair | None, own: Keypair | None) -> None:
    async def main() -> None:
        async with served() as at:
            assert not await asyncio.to_thread(call, at.where, server, own)
            await until(lambda: at.counts.total())
            assert not at.got
            assert await asyncio.to_thread(call, at.where, KEY, KEY)

    uvloop.run(main())


def test_a_members_handshake_replayed_gets_nobody_in() -> None:
    async def main() -> None:
        async with served() as at:
            taken = await asyncio.to_thread(record_handshake, at.where, KEY, [b"pay me"])
            await until(lambda: at.got)
            assert len(at.got) == 1
            assert await asyncio.to_thread(knock, at.where, taken) == "closed"
            await until(lambda: at.counts["refused-key"] + at.counts["bad-handshake"])
            await at.member_is_served()
            assert [frames[1] for frames in at.got] == [b"pay me", b"hi"]

    uvloop.run(main())


def test_who_says_nothing_is_hung_up_on_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_S", 0.3)

    async def main() -> None:
        async with served() as at:
            for data in (b"", greeting()[:20], greeting()):
                assert await asyncio.to_thread(knock, at.where, data) == "closed"
            assert at.counts["abandoned-handshake"] == 3

    uvloop.run(main())


def test_a_crowd_of_strangers_is_hung_up_on_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_S", 1.0)
    monkeypatch.setattr(doorman, "HANDSHAKE_S", 1.0)
    monkeypatch.setattr(doorman, "MAX_NEW", 50)

    async def main() -> None:
        async with served() as at:
            await at.member_is_served()
            process = psutil.Process()
            descriptors, back = process.num_fds(), []
            member = at.sockets.dealer(at.router.addresses[0], back.append, max_size=SIZE)
            await until(lambda: member.send([b"before"]))
            crowd = [await asyncio.open_connection(*at.where) for _ in range(300)]
            await until(lambda: at.counts["crowded"] >= 200)
            assert member.send([b"amid"])
            await until(lambda: len(back) == 2)  # who is in already is not disturbed
            for reader, writer in crowd:
                while await reader.read(100):
                    pass  # the greeting
                writer.close()
            await at.member_is_served()
            member.close()
            await until(lambda: process.num_fds() <= descriptors + 2)  # the loop's own come with its first use

    uvloop.run(main())


def test_a_flood_that_the_loop_has_not_seen_does_not_hang_its_close() -> None:
    async def main() -> None:
        async with served() as at:
            for _ in range(1500):  # three events each: more than a queue of libzmq's default length holds
                socket.create_connection(at.where).close()  # the loop is to be held up

    uvloop.run(main())
