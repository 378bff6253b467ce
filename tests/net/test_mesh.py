"""Several meshes in one process over real sockets: join, leave, die, refuse, admin."""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import uvloop

from p2pdyn.constants import PROTOCOL_VERSION
from p2pdyn.core.membership import MembershipConfig
from p2pdyn.core.types import READY, Address, NodeId, PeerInfo
from p2pdyn.net.admin import AdminError, admin_call
from p2pdyn.net.curve import Security, write_key_file
from p2pdyn.net.mesh import Mesh, Peer
from p2pdyn.net.sockets import Sockets

LOOPBACK = [Address("127.0.0.1", 0)]


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # conditions on what several loops did
            await asyncio.sleep(0.01)
    assert condition(), what


class Host:
    """One peer: its sockets, its mesh and what it was told."""

    def __init__(
        self, number: int, *, cluster: str = "c", security: Security | None = None, port: int = 0, epoch: int = 1000
    ) -> None:
        self.changes: list[tuple[NodeId, str | None, str]] = []
        self.fatal: list[str] = []
        self.sockets = Sockets(security or Security.insecure())
        self.mesh = Mesh(
            self.sockets,
            node=NodeId(f"{number:016x}"),
            epoch=epoch,
            cluster=cluster,
            info=PeerInfo(f"host-{number}", "0.1.0"),
            listen=[Address("127.0.0.1", port)],
            advertise_host="127.0.0.1",
            on_change=self._changed,
            on_fatal=self.fatal.append,
            rng=random.Random(number),
            config=MembershipConfig(),
        )

    def _changed(self, peer: Peer, was: str | None) -> None:
        self.changes.append((peer.id, was, peer.state))

    def state(self, other: Host) -> str | None:
        peer = self.mesh.peers.get(other.mesh.node)
        return None if peer is None else peer.state

    def sees(self, *others: Host) -> bool:
        return all(self.state(other) == "alive" for other in others)

    def close(self) -> None:
        self.mesh.close()
        self.sockets.close()


def scenario(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    def run(**fixtures: Any) -> None:
        async def main() -> None:
            async with AsyncExitStack() as stack:

                def start(*args: Any, seeds: tuple[Host, ...] = (), **kwargs: Any) -> Host:
                    host = Host(*args, **kwargs)
                    stack.callback(host.close)
                    host.mesh.start()
                    for seed in seeds:
                        host.mesh.introduce(seed.mesh.address, "seed")
                    return host

                await test(start, **fixtures)

        uvloop.run(main())

    return run


def test_five_peers_that_know_one_seed_find_each_other() -> None:
    async def body(start: Callable[..., Host]) -> None:
        first = start(1)
        hosts = [first, *(start(n, seeds=(first,)) for n in range(2, 6))]
        await until(lambda: all(h.sees(*hosts) for h in hosts), "all see all")
        for host in hosts:
            for peer in host.mesh.peers.values():
                assert peer.info.name == f"host-{int(peer.id, 16)}"
                assert peer.last_seen_s < 10
        met = [p for p in first.mesh.peers.values() if p.clock_s is not None]
        assert len(met) > 1
        assert all(abs(p.clock_s or 0.0) < 1.0 for p in met)
        assert first.mesh.loop_lag_s < 2.0

    scenario(body)()


def test_a_change_of_info_reaches_everybody() -> None:
    async def body(start: Callable[..., Host]) -> None:
        first = start(1)
        hosts = [first, *(start(n, seeds=(first,)) for n in (2, 3))]
        await until(lambda: all(h.sees(*hosts) for h in hosts), "all see all")
        first.mesh.update(PeerInfo("host-1", "0.1.0", state=READY, detail="€" * 400))
        await until(lambda: all(h.mesh.peers[first.mesh.node].info.state == READY for h in hosts), "told", 2.0)
        assert hosts[1].mesh.peers[first.mesh.node].info.detail.startswith("€")

    scenario(body)()


@pytest.mark.alone
def test_a_leaving_peer_is_left_and_a_killed_one_dead() -> None:
    async def body(start: Callable[..., Host]) -> None:
        first = start(1)
        hosts = [first, *(start(n, seeds=(first,)) for n in (2, 3, 4))]
        await until(lambda: all(h.sees(*hosts) for h in hosts), "all see all")
        await hosts[3].mesh.leave(2.0)
        await until(lambda: all(h.state(hosts[3]) == "left" for h in hosts[:3]), "left", 1.0)
        hosts[2].close()  # no goodbye
        await until(lambda: all(h.state(hosts[2]) == "dead" for h in hosts[:2]), "dead", 10.0)
        assert hosts[0].sees(hosts[1])
        assert hosts[1].sees(hosts[0])

    scenario(body)()


def test_a_restarted_peer_is_back_under_its_id_with_its_new_epoch() -> None:
    async def body(start: Callable[..., Host]) -> None:
        first = start(1)
        second, third = (start(n, seeds=(first,)) for n in (2, 3))
        await until(lambda: all(h.sees(first, second, third) for h in (first, second, third)), "all see all")
        port = third.mesh.address.port
        third.close()
        again = start(3, port=port, epoch=2000, seeds=(first,))
        await until(lambda: again.sees(first, second), "it sees them")
        for host in (first, second):
            await until(lambda host=host: host.mesh.peers[again.mesh.node].version.epoch == 2000, "seen anew")  # type: ignore[misc]
            assert host.sees(again)
            assert not host.fatal

    scenario(body)()


def test_another_cluster_is_refused_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    async def body(start: Callable[..., Host]) -> None:
        ours, theirs = start(1, cluster="ours"), start(2, cluster="theirs")
        theirs.mesh.introduce(ours.mesh.address, "seed")
        await until(lambda: ours.mesh.counters.get("foreign-cluster"), "counted here")
        await until(lambda: theirs.mesh.counters.get("foreign-cluster"), "counted there")
        assert ours.mesh.refused() == {"127.0.0.1": ours.mesh.counters["foreign-cluster"]}
        assert len(ours.mesh.peers) == len(theirs.mesh.peers) == 1

    scenario(body)()
    assert "belongs to cluster 'theirs', this peer to 'ours'" in caplog.text
    assert "belongs to cluster 'ours', this peer to 'theirs'" in caplog.text


def test_another_key_is_refused_on_both_sides_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_key_file(tmp_path / "ours")
    write_key_file(tmp_path / "theirs")

    async def body(start: Callable[..., Host]) -> None:
        ours = start(1, security=Security.load(tmp_path / "ours"))
        friend = start(2, security=Security.load(tmp_path / "ours"), seeds=(ours,))
        theirs = start(3, security=Security.load(tmp_path / "theirs"), seeds=(ours,))
        nobody = start(4, seeds=(ours,))
        await until(lambda: ours.sees(friend) and friend.sees(ours), "same key")
        await until(lambda: ours.mesh.refused().get("127.0.0.1", 0) >= 2, "counted")
        address = str(ours.mesh.address)
        await until(lambda: f"{address} hung up on this peer's cluster key" in caplog.text, "told the wrong key")
        no_key = re.compile(re.escape(address) + " (wants a cluster key|hung up: if it wants a cluster key), ")
        await until(lambda: no_key.search(caplog.text), "told no key")
        assert len(ours.mesh.peers) == 2
        assert len(theirs.mesh.peers) == len(nobody.mesh.peers) == 1

    scenario(body)()


def test_garbage_of_every_kind_is_counted_and_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def body(start: Callable[..., Host]) -> None:
        one, two = start(1), start(2)
        two.mesh.introduce(one.mesh.address, "seed")
        await until(lambda: one.sees(two) and two.sees(one), "joined")
        sockets = one.sockets
        up = asyncio.Event()
        rogue = sockets.dealer(one.mesh.address, lambda frames: None, max_size=1 << 16, on_up=up.set)
        async with asyncio.timeout(5):
            await up.wait()
        for frames in (
            [b""],
            [b"\x01"],
            [b"x", b"y"],
            [b"\x01\xc1", b"\x01\x91\x10"],
            [b"a"] * 50,
            [b"\x01\x92\x10\x01"] * 2,
        ):
            assert rogue.send(frames)
        assert rogue.send([bytes([PROTOCOL_VERSION + 1]) + b"hello", b"later"])
        await until(lambda: one.mesh.counters.get("future-version") == 1, "future version")
        assert one.mesh.counters["bad-message"] == 5  # the 50-frame one is dropped before it gets here
        assert any("upgrade" in text for text in one.mesh.alarms())
        for raw in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 300, b"\xff" + b"\x00" * 8 + b"\x7f" + b"\x07" * 900):
            with socket.create_connection(("127.0.0.1", one.mesh.address.port)) as visitor:
                visitor.sendall(raw)
        handshakes = ("bad-handshake", "abandoned-handshake")
        await until(lambda: any(one.mesh.counters.get(kind) for kind in handshakes), "raw garbage")
        await asyncio.sleep(1.0)  # several probe rounds
        assert one.sees(two)
        assert two.sees(one)

    scenario(body)()
    assert caplog.text.count("that cannot be read") == 1  # one line a minute and address


def test_admin_answers_in_pages_and_errors_are_sentences() -> None:
    async def body(start: Callable[..., Host]) -> None:
        host, client = start(1), Sockets(Security.insecure())
        big = {"items": ["x" * 100] * 5000}

        async def slow(args: dict[str, Any]) -> dict[str, Any]:
            await asyncio.sleep(0)
            return {"echo": args}

        def refuse(args: dict[str, Any]) -> dict[str, Any]:
            raise ValueError("no such node 'zz'")

        host.mesh.on_admin("big", lambda args: big)
        host.mesh.on_admin("slow", slow)
        host.mesh.on_admin("refuse", refuse)
        host.mesh.on_admin("broken", lambda args: {"x": object()})
        address = host.mesh.address
        try:
            assert await admin_call(client, address, "big", {}, 5.0) == big
            assert await admin_call(client, Address("localhost", address.port), "slow", {"a": 1}, 5.0) == {
                "echo": {"a": 1}
            }
            with pytest.raises(AdminError, match="no such node 'zz'"):
                await admin_call(client, address, "refuse", {}, 5.0)
            with pytest.raises(AdminError, match="broken failed: see the peer's log"):
                await admin_call(client, address, "broken", {}, 5.0)
            with pytest.raises(AdminError, match="unknown admin operation 'nothing'"):
                await admin_call(client, address, "nothing", {}, 5.0)
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                with pytest.raises(ConnectionError, match="refused the connection"):
                    await admin_call(client, Address("127.0.0.1", closed.getsockname()[1]), "big", {}, 5.0)
                closed.listen(1)
                with pytest.raises(TimeoutError):
                    await admin_call(client, Address("127.0.0.1", closed.getsockname()[1]), "big", {}, 0.3)
        finally:
            client.close()

    scenario(body)()
