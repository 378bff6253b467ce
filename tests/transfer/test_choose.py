"""Which mover is chosen, for a node and for each peer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
from support.kv_reader import LOCAL, OwnerProcess, Reader, needs_nixl, run

from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets
from p2pdyn.transfer import choose as module
from p2pdyn.transfer.base import Mover, TransferError
from p2pdyn.transfer.choose import choose
from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.schema import TRANSFER
from p2pdyn.wire.transfer import Description, Offer

Owners = Callable[..., OwnerProcess]


@pytest.mark.parametrize(
    ("kind", "installed", "names"),
    [
        ("auto", True, ("nixl", "tcp")),
        ("auto", False, ("tcp",)),
        ("nixl", True, ("nixl",)),
        ("tcp", True, ("tcp",)),
    ],
)
def test_what_peers_are_told_a_worker_can_move_by(
    kind: str, installed: bool, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_nixl", lambda: installed)
    assert module.means(kind) == names


def choose_once(kind: str, check: Callable[[Mover], None]) -> None:
    async def main() -> None:
        sockets = Sockets(Security.insecure())
        try:
            from support.kv_owner import allocate

            mover = choose(kind, sockets, "node-1", LOCAL, allocate(4, 64), lambda block: True)
            try:
                check(mover)
            finally:
                await mover.close()
        finally:
            sockets.close()

    asyncio.run(main())


def test_off_is_refused() -> None:
    with pytest.raises(TransferError, match="off"):
        choose_once("off", lambda mover: None)


def test_without_nixl_auto_is_tcp_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_has_nixl", lambda: False)

    def check(mover: Mover) -> None:
        assert mover.name == "tcp"

    choose_once("auto", check)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "nixl-cu12" in warnings[0]
    with pytest.raises(TransferError, match="nixl-cu12"):
        choose_once("nixl", check)


@needs_nixl
def test_auto_reads_over_nixl_where_both_have_it(owners: Owners, caplog: pytest.LogCaptureFixture) -> None:
    owner = owners("auto")

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        ticket, over = reader.start(owner.name, range(200), range(200))
        assert reader.mover.reads == 1
        assert await over == ""
        reader.mover.cancel(ticket)
        assert reader.has(range(200), range(200))
        assert reader.mover.bytes_read == 200 * 65568
        assert (reader.mover.reads, reader.mover.errors) == (0, 0)
        assert reader.mover.bandwidth > 0

    run("auto", body)
    assert owner.stats()["bytes_served"] == 0
    assert not caplog.records


@needs_nixl
def test_auto_reads_over_tcp_from_a_peer_that_has_no_nixl(owners: Owners, caplog: pytest.LogCaptureFixture) -> None:
    first, second = owners("tcp"), owners("tcp")

    async def body(reader: Reader) -> None:
        for owner in (first, second):
            await reader.meet(owner)
            assert await reader.read(owner.name, [1], [2]) == ""
            assert reader.has([1], [2])

    run("auto", body)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "over nixl" in warnings[0]


def test_tcp_reads_from_a_peer_that_offers_more(owners: Owners) -> None:
    owner = owners("auto")

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        assert await reader.read(owner.name, [1], [2]) == ""

    run("tcp", body)


@needs_nixl
def test_memory_on_another_host_without_rdma_is_read_over_tcp(owners: Owners) -> None:
    owner = owners("auto")
    offer = decode(TRANSFER, owner.description)
    assert isinstance(offer, Offer)
    descriptions = [decode(TRANSFER, data) for data in offer.descriptions]
    elsewhere = [replace(d, machine=1) for d in descriptions if isinstance(d, Description)]
    owner.description = encode(Offer(tuple([encode(description) for description in elsewhere])))

    async def body(reader: Reader) -> None:
        await reader.meet(owner)
        assert await reader.read(owner.name, range(10), range(10)) == ""

    run("auto", body)
    assert owner.stats()["bytes_served"] > 10 * 65568
