"""Real zeroconf on loopback, two or three peers in one process; the pure parts as tables."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from p2pdyn.core.types import Address
from p2pdyn.net.interfaces import Interface, pick
from p2pdyn.net.mdns import Announcement, Mdns, nearest, read_announcement, refusal

LOOPBACK = pick("127.0.0.1").interfaces
KNOWN_S = 2.5


class Peer:
    """One announced peer and what it heard."""

    def __init__(self, number: int, cluster: str, key: str = "aaaa", interfaces: tuple[Interface, ...] = LOOPBACK):
        self.address = Address("127.0.0.1", 7000 + number)
        self.heard: dict[Address, dict[str, str]] = {}
        self.refused: list[str] = []
        self._news = asyncio.Event()
        self.mdns = Mdns(
            node=f"{number:016x}",
            cluster=cluster,
            name=f"peer-{number}",
            port=self.address.port,
            addresses=["127.0.0.1"],
            key_fingerprint=key,
            interfaces=interfaces,
            on_peer=self._peer,
            on_refused=self._refusal,
        )

    def _peer(self, address: Address, txt: dict[str, str]) -> None:
        self.heard[address] = txt
        self._news.set()

    def _refusal(self, address: Address, why: str) -> None:
        assert str(address) in why
        self.refused.append(why)
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(KNOWN_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def knows(self, *others: Peer) -> None:
        """Within what the product promises for a new peer."""
        await self.until(lambda: {o.address for o in others} <= self.heard.keys())


@contextlib.asynccontextmanager
async def started(*peers: Peer) -> AsyncIterator[None]:
    try:
        for peer in peers:
            await peer.mdns.start()
        yield
    finally:
        await asyncio.gather(*(peer.mdns.close() for peer in peers))


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def leaving_nothing() -> None:
        await scenario
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(leaving_nothing())


@pytest.fixture
def cluster() -> str:
    """A name of its own a test: other processes may speak mDNS on this host too."""
    return f"test-{uuid.uuid4().hex[:8]}"


def test_a_new_peer_and_an_old_one_find_each_other(cluster: str) -> None:
    async def scenario() -> None:
        a, b = Peer(1, cluster), Peer(2, cluster)
        async with started(a):
            async with started(b):
                await asyncio.gather(a.knows(b), b.knows(a))
            assert a.heard[b.address]["id"] == f"{2:016x}"
            assert a.heard[b.address]["name"] == "peer-2"
            assert a.address not in a.heard

    run(scenario())


def test_a_goodbye_removes_nobody_and_a_return_is_heard_again(cluster: str) -> None:
    async def scenario() -> None:
        a, b, again = Peer(1, cluster), Peer(2, cluster), Peer(2, cluster)
        async with started(a):
            async with started(b):
                await a.knows(b)
            a.heard.clear()
            async with started(again):
                await a.knows(again)

    run(scenario())


def test_another_cluster_is_ignored(cluster: str) -> None:
    async def scenario() -> None:
        a, foreign, b = Peer(1, cluster), Peer(2, cluster + "-other"), Peer(3, cluster)
        async with started(a, foreign, b):
            await asyncio.gather(a.knows(b), b.knows(a))
            assert foreign.address not in a.heard
            assert not a.refused

    run(scenario())


def test_wrong_keys_both_sides_name_each_other_once(cluster: str) -> None:
    async def scenario() -> None:
        a, wrong, none = Peer(1, cluster), Peer(2, cluster, "bbbb"), Peer(3, cluster, "")
        async with started(a, wrong, none):
            for peer in (a, wrong, none):
                await peer.until(lambda peer=peer: len(peer.refused) == 2)  # type: ignore[misc]
            assert not a.heard
            assert not wrong.heard
            assert "127.0.0.1:7002" in " ".join(a.refused)
            assert "peer-1" in " ".join(wrong.refused)
            a.mdns._browse()  # hearing of them again is no news
            wrong.mdns._browse()
            await asyncio.gather(*a.mdns._resolving.values())
            assert len(a.refused) == 2
            assert all("--cluster-key" in why for why in a.refused)

    run(scenario())


def test_rotating_keys_one_in_common_is_enough(cluster: str) -> None:
    async def scenario() -> None:
        old, both = Peer(1, cluster, "old"), Peer(2, cluster, "new,old")
        async with started(old, both):
            await asyncio.gather(old.knows(both), both.knows(old))

    run(scenario())


def test_two_peers_with_one_id_both_stay_visible(cluster: str) -> None:
    async def scenario() -> None:
        watcher, first, second = Peer(1, cluster), Peer(2, cluster), Peer(2, cluster)
        second.address = Address("127.0.0.1", 7999)
        second.mdns = Mdns(
            node=first.mdns.local.id,
            cluster=cluster,
            name="peer-2-copy",
            port=7999,
            addresses=["127.0.0.1"],
            key_fingerprint="aaaa",
            interfaces=LOOPBACK,
            on_peer=second._peer,
            on_refused=second._refusal,
        )
        async with started(watcher, first, second):
            await watcher.knows(first, second)
            await asyncio.gather(first.knows(second), second.knows(first))

    run(scenario())


def test_a_bad_interface_is_a_warning(cluster: str, caplog: pytest.LogCaptureFixture) -> None:
    bad = Interface("gone0", 4242, "physical", ("192.0.2.77",), ("192.0.2.0/24",), 0, "")

    async def scenario() -> None:
        a, b = Peer(1, cluster, interfaces=(bad, *LOOPBACK)), Peer(2, cluster)
        async with started(a, b):
            await asyncio.gather(a.knows(b), b.knows(a))

    run(scenario())
    assert "leaves out interface gone0" in caplog.text


@pytest.mark.parametrize(
    ("addresses", "networks", "expected"),
    [
        (["10.0.0.1", "192.168.1.1"], ["192.168.1.0/24"], ["192.168.1.1"]),
        (["10.0.0.1", "192.168.1.1"], ["172.16.0.0/16"], ["10.0.0.1", "192.168.1.1"]),
        (["fe80::1%3", "10.0.0.1"], [], ["10.0.0.1"]),
        (["fe80::1%3", "fe80::1"], [], ["fe80::1%3"]),
        (["fe80::1"], [], []),
        (["fd00::7", "fe80::1%3"], ["fd00::/64"], ["fd00::7"]),
    ],
)
def test_the_nearest_addresses(addresses: list[str], networks: list[str], expected: list[str]) -> None:
    assert nearest(addresses, networks) == expected


def announcement(key: str) -> Announcement:
    return Announcement("00ff", "lab", "ann", key, "1", 7400, ("10.0.0.1",))


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ("", "", ""),
        ("a", "a", ""),
        ("a,b", "b,c", ""),
        ("a", "b", "ann (00ff) at 10.0.0.1:7400 announces cluster 'lab' with another cluster key"),
        ("a", "", "start this one with --cluster-key"),
        ("", "b", "start that one with --cluster-key"),
    ],
)
def test_the_refusal_says_which_side_and_the_mend(theirs: str, ours: str, words: str) -> None:
    why = refusal(announcement(theirs), ours)
    assert words in why
    assert bool(why) == bool(words)


@pytest.mark.parametrize("missing", ["id", "cluster"])
def test_what_is_no_announcement_of_ours(missing: str) -> None:
    good: dict[str, str | None] = {"id": "1", "cluster": "c", "name": None, "key": None}
    assert read_announcement(good, 1, ["10.0.0.1"]) is not None
    assert read_announcement({**good, missing: None}, 1, ["10.0.0.1"]) is None
    assert read_announcement({**good, missing: "x\x1b[2J"}, 1, ["10.0.0.1"]) is None
    assert read_announcement(good, None, ["10.0.0.1"]) is None
    assert read_announcement(good, 1, []) is None
