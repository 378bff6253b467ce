"""The tcp mover against peers that do not keep to the protocol, and with keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import uvloop
from support.kv_owner import TAG, allocate, content, fill
from support.kv_reader import BLOCKS, LOCAL, STRIDE, OwnerProcess, Reader, run

from p2pdyn.constants import PROTOCOL_VERSION, TRANSFER_MAX
from p2pdyn.core.types import Address
from p2pdyn.net.curve import Security, write_key_file
from p2pdyn.net.link import Link
from p2pdyn.net.sockets import Sockets
from p2pdyn.transfer.base import TransferError
from p2pdyn.transfer.tcp import WINDOW, TcpMover
from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.schema import TRANSFER
from p2pdyn.wire.transfer import MAX_SPANS, PART, Ask, Description, Part, Probe, Refusal, Span, pack_spans

Owners = Callable[..., OwnerProcess]
VERSION = bytes([PROTOCOL_VERSION])


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what it waits for happens in ZeroMQ's threads
            await asyncio.sleep(0.002)


class Stranger:
    """A DEALER at an owner, that sends what it likes."""

    def __init__(self, sockets: Sockets, address: Address, high_water: int = 100) -> None:
        self.answers: list[list[bytes]] = []
        self.up = asyncio.Event()
        self.link = sockets.dealer(
            address, self.answers.append, max_size=TRANSFER_MAX, on_up=self.up.set, high_water=high_water
        )

    async def ask(self, *frames: bytes) -> list[bytes]:
        self.link.send(list(frames))
        return await self.answer()

    async def answer(self) -> list[bytes]:
        await until(lambda: self.answers)
        return self.answers.pop(0)


def with_owner(body: Callable[[TcpMover, Stranger, int], Any], free: frozenset[int] = frozenset()) -> None:
    async def main() -> None:
        sockets = Sockets(Security.insecure())
        try:
            regions = allocate(BLOCKS, STRIDE)
            fill(regions)
            mover = TcpMover(sockets, LOCAL, regions, lambda block: block not in free)
            description = decode(TRANSFER, mover.describe())
            assert isinstance(description, Description)
            stranger = Stranger(sockets, mover.owner.address)
            async with asyncio.timeout(30):
                await stranger.up.wait()
                await body(mover, stranger, description.life)
            await mover.close()
        finally:
            sockets.close()

    uvloop.run(main())


def test_an_owner_drops_and_counts_what_is_no_message() -> None:
    async def body(mover: TcpMover, stranger: Stranger, life: int) -> None:
        good = encode(Probe(1, life, 10))
        bad = [
            [b""],
            [b"\xff" * 100],
            [good[:-1]],
            [good + b"\0"],
            [good, b"more"],
            [VERSION + msgpack.packb([99, 1])],
            [VERSION + msgpack.packb([4, 1, life, PART + 1])],
            [VERSION + msgpack.packb([4, -1, life, 1])],
            [VERSION + msgpack.packb([3, 1, life, b"x" * (13 * MAX_SPANS + 1)])],
            [VERSION + msgpack.packb([3, 1, life, [1, 2, 3]])],
            [encode(Part(1))],
            [encode(Refusal(1, "no"))],
            [mover.describe()],
        ]
        for frames in bad:
            stranger.link.send(frames)
        assert await stranger.ask(good) == [encode(Part(1)), bytes(10)]
        assert mover.owner.malformed == len(bad)
        assert mover.owner.bytes_served == 10

    with_owner(body)


def test_an_owner_refuses_what_it_does_not_hold() -> None:
    async def body(mover: TcpMover, stranger: Stranger, life: int) -> None:
        size = BLOCKS * STRIDE
        refused = [
            [],
            [Span(0, 0, 0)],
            [Span(2, 0, 16)],
            [Span(255, 0, 16)],
            [Span(0, size, 1)],
            [Span(0, size - 1, 2)],
            [Span(0, 2**64 - 1, 2**32 - 1)],
            [Span(0, 0, PART + 1)],
            [Span(0, 0, PART), Span(1, 0, 1)],
            [Span(0, 7 * STRIDE, 1)],
            [Span(0, 6 * STRIDE, STRIDE + 1)],
            [Span(1, 0, TAG), Span(1, 7 * TAG, TAG)],
        ]
        for number, spans in enumerate(refused):
            answer = decode(TRANSFER, (await stranger.ask(encode(Ask(number, life, pack_spans(spans)))))[0])
            assert isinstance(answer, Refusal)
            assert answer.number == number
        assert isinstance(decode(TRANSFER, (await stranger.ask(encode(Ask(1, life, b"x" * 12))))[0]), Refusal)
        assert isinstance(decode(TRANSFER, (await stranger.ask(encode(Probe(1, life ^ 1, 1))))[0]), Refusal)
        assert mover.owner.refused == len(refused) + 2
        assert mover.owner.bytes_served == 0
        spans = [Span(0, 6 * STRIDE, STRIDE), Span(1, 8 * TAG, TAG)]
        answer = await stranger.ask(encode(Ask(9, life, pack_spans(spans))))
        assert answer == [encode(Part(9)), content(6, STRIDE) + content(8, TAG)]

    with_owner(body, frozenset([7]))


def test_a_read_of_a_block_that_is_not_held_ends_with_the_reason(owners: Owners) -> None:
    owner = owners("tcp", free=[5])

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        assert "not held" in await reader.read(owner.name, range(10), range(10))
        assert await reader.read(owner.name, [4, 6], [4, 6]) == ""
        assert (reader.mover.reads, reader.mover.errors) == (0, 1)

    run("tcp", body)


def test_a_reader_that_asks_and_never_reads_costs_the_owner_a_bounded_queue() -> None:
    async def body(mover: TcpMover, stranger: Stranger, life: int) -> None:
        greedy = Stranger(mover._sockets, mover.owner.address, high_water=1)
        await greedy.up.wait()
        greedy.link._pump.close()  # it reads nothing from here on
        for number in range(400):
            await until(lambda number=number: greedy.link.send([encode(Probe(number, life, PART))]))
        assert await stranger.ask(encode(Probe(1, life, 1))) == [encode(Part(1)), b"\0"]
        assert mover.owner.bytes_served < 200 * PART

    with_owner(body)


class FalseOwner:
    """A ROUTER that answers as the test says, ``answer(number, size)``: frames of each answer."""

    def __init__(self, sockets: Sockets, answer: Callable[[int, int], list[list[bytes]]]) -> None:
        self._answer = answer
        self.asked = 0
        self.silent = False
        self.link: Link = sockets.router([LOCAL], self._receive, max_size=TRANSFER_MAX)
        self.description = encode(Description("tcp", 1, BLOCKS, (STRIDE, TAG), self.link.addresses[0].port))

    def _receive(self, frames: list[bytes]) -> None:
        message = decode(TRANSFER, frames[1])
        if isinstance(message, Probe):
            self.link.send([frames[0], encode(Part(message.number)), bytes(message.size)])
            return
        assert isinstance(message, Ask)
        self.asked += 1
        size = sum(int.from_bytes(message.spans[at + 9 : at + 13], "little") for at in range(0, len(message.spans), 13))
        for answer in self._answer(message.number, size):
            self.link.send([frames[0], *answer])


def with_false_owner(
    answer: Callable[[int, int], list[list[bytes]]], body: Callable[[FalseOwner, Reader], Any]
) -> None:
    async def main() -> None:
        sockets = Sockets(Security.insecure())
        try:
            regions = allocate(BLOCKS, STRIDE)
            mover = TcpMover(sockets, LOCAL, regions, lambda block: True)
            owner = FalseOwner(sockets, answer)
            async with asyncio.timeout(30):
                await mover.meet("false-1", "127.0.0.1", owner.description)
                await body(owner, Reader(mover, regions))
            await mover.close()
        finally:
            sockets.close()

    uvloop.run(main())


def test_a_reader_drops_and_counts_answers_that_it_did_not_ask_for() -> None:
    def answer(number: int, size: int) -> list[list[bytes]]:
        garbage = [
            [b"\xff"],
            [encode(Part(number))],
            [encode(Part(number)), b"x" * (size + 1)],
            [encode(Part(number)), b"x" * size, b""],
            [encode(Part(number + 10**6)), b"x" * size],
            [encode(Refusal(number + 10**6, "no"))],
            [encode(Probe(number, 1, 1))],
        ]
        right = [encode(Part(number)), b"y" * size]
        return [*garbage, right, right]

    async def body(owner: FalseOwner, reader: Reader) -> None:
        assert await reader.read("false-1", [0], [9]) == ""
        assert reader.regions[0].memory[9 * STRIDE : 10 * STRIDE] == b"y" * STRIDE
        assert reader.empty([*range(9), *range(10, BLOCKS)])
        assert await reader.read("false-1", [0], [9]) == ""
        assert isinstance(reader.mover, TcpMover)
        assert reader.mover.malformed >= 7 * owner.asked

    with_false_owner(answer, body)


def test_a_reader_keeps_a_window_and_serves_its_reads_in_turn() -> None:
    numbers: list[int] = []

    def answer(number: int, size: int) -> list[list[bytes]]:
        numbers.append(number)
        return []

    async def body(owner: FalseOwner, reader: Reader) -> None:
        long = reader.start("false-1", range(BLOCKS), range(BLOCKS))[1]
        await until(lambda: owner.asked == WINDOW)
        short_ticket, short = reader.start("false-1", [0], [0])
        await asyncio.sleep(0.05)
        assert owner.asked == WINDOW
        reader.mover.cancel(short_ticket)
        assert await short == "it was cancelled"
        owner.link.close()
        assert "broke" in await long
        assert "down" in await reader.read("false-1", [0], [0])

    with_false_owner(answer, body)


def test_with_a_key_and_without(owners: Owners, tmp_path: Path) -> None:
    key = tmp_path / "key"
    write_key_file(key)
    owner = owners("tcp", key=str(key))

    async def reads(reader: Reader) -> None:
        await reader.meet(owner)
        assert await reader.read(owner.name, range(100), range(100)) == ""
        assert reader.has(range(100), range(100))

    async def is_turned_away(reader: Reader) -> None:
        with pytest.raises(TransferError, match="cannot be reached"):
            await reader.meet(owner)

    run("tcp", reads, security=Security.load(key))
    run("tcp", is_turned_away)
