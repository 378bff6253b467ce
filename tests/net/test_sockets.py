"""Links over real sockets on loopback: each of ZeroMQ's traps (docs/design/wire.md), keys, and garbage on the port."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq

from p2pdyn.constants import CONTROL_MAX, REQUEST_MAX
from p2pdyn.core.types import Address
from p2pdyn.net.curve import KeyFileError, Keypair, Security, write_key_file
from p2pdyn.net.link import Link
from p2pdyn.net.sockets import HIGH_WATER, Sockets

LOCAL = Address("127.0.0.1", 0)
SIZE = 1 << 20


def key() -> Keypair:
    return Keypair(*zmq.curve_keypair())


def run(body: Callable[[Sockets], Any], security: Security | None = None) -> None:
    async def main() -> None:
        sockets = Sockets(security or Security.insecure())
        try:
            async with asyncio.timeout(30):
                await body(sockets)
        finally:
            sockets.close()

    uvloop.run(main())


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # what it waits for happens in ZeroMQ's threads
            await asyncio.sleep(0.005)


class Client:
    """A DEALER and what happened to it."""

    def __init__(self, sockets: Sockets, address: Address, max_size: int = SIZE) -> None:
        self.got: list[list[bytes]] = []
        self.downs: list[str] = []
        self.ups = 0
        self.link = sockets.dealer(
            address, self.got.append, max_size=max_size, on_up=self._count, on_down=self.downs.append
        )

    def _count(self) -> None:
        self.ups += 1

    async def up(self, times: int = 1) -> Client:
        await until(lambda: self.ups >= times)
        return self


def echo(
    sockets: Sockets, addresses: Sequence[Address] = (LOCAL,), max_size: int = SIZE
) -> tuple[Link, list[list[bytes]]]:
    got: list[list[bytes]] = []

    def receive(frames: list[bytes]) -> None:
        got.append(frames)
        link.send(frames)

    link = sockets.router(addresses, receive, max_size=max_size)
    return link, got


class Stalled:
    """A peer whose process hangs: the connection is open, nothing is ever read."""

    def __init__(self, kind: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.rcvhwm = 1
        self.socket.linger = 0

    def close(self) -> None:
        if not self.socket.closed:
            self.socket.close()
            self.context.term()


@pytest.fixture
def stalled() -> Iterator[Callable[[int], Stalled]]:
    with ExitStack() as stack:

        def make(kind: int) -> Stalled:
            peer = Stalled(kind)
            stack.callback(peer.close)
            return peer

        yield make


# ZeroMQ's traps.


def test_what_waits_for_a_dead_worker_is_not_delivered_to_its_successor(stalled: Callable[[int], Stalled]) -> None:
    async def body(sockets: Sockets) -> None:
        dead = stalled(zmq.ROUTER)
        port = dead.socket.bind_to_random_port("tcp://127.0.0.1")
        client = await Client(sockets, Address("127.0.0.1", port)).up()
        while client.link.send([b"stale" * 4000]):
            pass
        dead.close()
        await until(lambda: client.downs)
        assert not client.link.send([b"stale"])  # IMMEDIATE: nothing queues for a connection that is not there
        _, got = echo(sockets, [Address("127.0.0.1", port)])
        await client.up(2)
        assert client.link.send([b"fresh"])
        await until(lambda: client.got)
        assert [frames[1:] for frames in got] == [[b"fresh"]]
        assert client.downs == [f"the connection to 127.0.0.1:{port} was lost"]

    run(body)


def test_at_the_high_water_mark_a_send_says_no_and_nothing_vanishes(stalled: Callable[[int], Stalled]) -> None:
    async def body(sockets: Sockets) -> None:
        deaf = stalled(zmq.ROUTER)
        port = deaf.socket.bind_to_random_port("tcp://127.0.0.1")
        client = await Client(sockets, Address("127.0.0.1", port)).up()
        taken = 0
        while client.link.send([b"%d" % taken, b"x" * 10_000]):
            taken += 1
        assert taken >= HIGH_WATER // 2
        assert client.link.unsent == 1
        received = []
        while len(received) < taken:  # the stalled peer reads again: everything that was taken is there, in order
            assert deaf.socket.poll(5000)
            received.append(int(deaf.socket.recv_multipart()[1]))
        assert received == list(range(taken))
        assert not deaf.socket.poll(50)

    run(body)


def test_a_router_says_no_for_unknown_gone_and_stalled_connections(stalled: Callable[[int], Stalled]) -> None:
    async def body(sockets: Sockets) -> None:
        router, got = echo(sockets)
        assert not router.send([b"\0none", b"x"])
        client = await Client(sockets, router.addresses[0]).up()
        client.link.send([b"hello"])
        await until(lambda: got)
        client.link.close()
        await until(lambda: not router.send([got[0][0], b"x"]))
        deaf = stalled(zmq.DEALER)
        deaf.socket.connect(router.addresses[0].endpoint)
        deaf.socket.send(b"hello")
        await until(lambda: len(got) == 2)
        sent = 0
        while router.send([got[1][0], b"x" * 10_000]):
            sent += 1
            assert sent < 100_000
        assert sent >= HIGH_WATER // 2
        other = await Client(sockets, router.addresses[0]).up()  # one stalled connection holds up nobody else
        other.link.send([b"hi"])
        await until(lambda: other.got == [[b"hi"]])

    run(body)


def test_a_peer_is_served_again_while_its_first_connection_hangs_half_open(stalled: Callable[[int], Stalled]) -> None:
    async def body(sockets: Sockets) -> None:
        router, got = echo(sockets)
        hanging = stalled(zmq.DEALER)
        hanging.socket.connect(router.addresses[0].endpoint)
        hanging.socket.send(b"me")
        await until(lambda: got)
        again = await Client(sockets, router.addresses[0]).up()
        again.link.send([b"me"])
        await until(lambda: again.got == [[b"me"]])
        assert got[0][0] != got[1][0]

    run(body)


def test_a_burst_of_50000_messages_is_drained_without_holding_up_the_loop() -> None:
    async def body(sockets: Sockets) -> None:
        count, back, batches = 50_000, 0, 0
        gaps: list[float] = []
        loop = asyncio.get_running_loop()
        router, got = echo(sockets)  # answers from inside its receive callback, which consumes edges

        def receive(frames: list[bytes]) -> None:
            nonlocal back
            back += 1

        def batch_done() -> None:
            nonlocal batches
            batches += 1

        async def tick() -> None:
            while True:
                before = loop.time()
                await asyncio.sleep(0.001)
                gaps.append(loop.time() - before)

        ticking = asyncio.ensure_future(tick())
        link = sockets.dealer(router.addresses[0], receive, max_size=SIZE, batch_done=batch_done)
        sent = 0
        while sent < count:
            if link.send([b"x" * 100]):
                sent += 1
            else:
                await asyncio.sleep(0)
        await until(lambda: back == count, 20.0)
        ticking.cancel()
        assert len(got) == count
        assert batches < count
        assert sorted(gaps)[len(gaps) // 2] < 0.05
        link.send([b"last"])  # the edge is not lost after the burst
        await until(lambda: back == count + 1)

    run(body)


@pytest.mark.alone
def test_a_large_prompt_does_not_hold_up_the_control_link() -> None:
    async def body(sockets: Sockets) -> None:
        requests, prompts = echo(sockets, max_size=REQUEST_MAX)
        control, _ = echo(sockets, max_size=CONTROL_MAX)
        big = await Client(sockets, requests.addresses[0], REQUEST_MAX).up()
        small = await Client(sockets, control.addresses[0], CONTROL_MAX).up()
        for _ in range(8):
            assert big.link.send([bytes(16 * 2**20)])
        small.link.send([b"probe"])
        await until(lambda: small.got)
        assert len(prompts) < 8
        await until(lambda: len(prompts) == 8)

    run(body)


def test_a_message_over_the_cap_ends_its_own_connection_only() -> None:
    async def body(sockets: Sockets) -> None:
        router, got = echo(sockets, max_size=CONTROL_MAX)
        good = await Client(sockets, router.addresses[0]).up()
        bad = await Client(sockets, router.addresses[0]).up()
        bad.link.send([bytes(CONTROL_MAX + 1)])
        await until(lambda: bad.downs)
        good.link.send([bytes(CONTROL_MAX)])
        await until(lambda: good.got)
        assert len(got) == 1
        assert not good.downs

    run(body)


def test_a_message_of_very_many_frames_is_dropped() -> None:
    async def body(sockets: Sockets) -> None:
        router, got = echo(sockets)
        client = await Client(sockets, router.addresses[0]).up()
        client.link.send([b""] * 10_000)
        client.link.send([b"after"])
        await until(lambda: client.got == [[b"after"]])
        assert len(got) == 1

    run(body)


# Life of a link.


def test_a_link_tells_refused_lost_and_back() -> None:
    async def body(sockets: Sockets) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            client = Client(sockets, Address("127.0.0.1", port))
            await until(lambda: client.downs)
        assert client.downs == [f"127.0.0.1:{port} refused the connection"]
        router, _ = echo(sockets, [Address("127.0.0.1", port)])
        await client.up()
        router.close()
        await until(lambda: len(client.downs) == 2)
        assert client.downs[1] == f"the connection to 127.0.0.1:{port} was lost"
        router, _ = echo(sockets, [Address("127.0.0.1", port)])
        await client.up(2)

    run(body)


def test_a_listener_that_says_nothing_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pdyn.net.sockets.HANDSHAKE_S", 0.3)

    async def body(sockets: Sockets) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = Client(sockets, Address("127.0.0.1", silent.getsockname()[1]))
            await until(lambda: client.downs)
        assert "does not answer as a p2pdyn peer" in client.downs[0]

    run(body)


def test_links_may_be_closed_from_their_own_callbacks() -> None:
    async def body(sockets: Sockets) -> None:
        closed: list[str] = []
        router, _ = echo(sockets)
        one = sockets.dealer(
            router.addresses[0], lambda frames: (one.close(), closed.append("receive")), max_size=SIZE,
            on_up=lambda: one.send([b"x"]),
        )  # fmt: skip
        two = sockets.dealer(
            router.addresses[0], print, max_size=SIZE, on_down=lambda reason: (two.close(), closed.append("down"))
        )
        await until(lambda: closed == ["receive"])
        assert not one.send([b"y"])
        one.close()
        router.close()
        await until(lambda: closed == ["receive", "down"])

    run(body)


def test_a_callback_that_raises_does_not_stop_the_link() -> None:
    async def body(sockets: Sockets) -> None:
        errors: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context["exception"]))
        got: list[bytes] = []

        def receive(frames: list[bytes]) -> None:
            got.append(frames[1])
            if frames[1] == b"bad":
                raise RuntimeError("a bug")

        router = sockets.router([LOCAL], receive, max_size=SIZE)
        client = await Client(sockets, router.addresses[0]).up()
        for text in (b"bad", b"good", b"bad", b"good"):
            client.link.send([text])
        await until(lambda: len(got) == 4)
        assert [str(error) for error in errors] == ["a bug", "a bug"]

    run(body)


def test_publishing_reaches_those_who_subscribed() -> None:
    async def body(sockets: Sockets) -> None:
        subscribed: list[tuple[bytes, bool]] = []
        xpub = sockets.xpub([LOCAL], max_size=SIZE, on_subscribe=lambda topic, on: subscribed.append((topic, on)))
        assert xpub.send([b"K", b"nobody hears"])
        loads: list[list[bytes]] = []
        sub = sockets.sub(xpub.addresses[0], loads.append, [b"L"], max_size=SIZE)
        await until(lambda: subscribed == [(b"L", True)])
        xpub.send([b"K", b"blocks"])
        xpub.send([b"L", b"load"])
        await until(lambda: loads == [[b"L", b"load"]])
        sub.close()
        await until(lambda: subscribed == [(b"L", True), (b"L", False)])

    run(body)


def test_one_port_for_all_addresses_ipv6_included() -> None:
    async def body(sockets: Sockets) -> None:
        router, _ = echo(sockets, [LOCAL, Address("::1", 0)])
        four, six = router.addresses
        assert four.port == six.port > 0
        for address in (six, Address("localhost", four.port)):
            client = await Client(sockets, address).up()
            client.link.send([b"hi"])
            await until(lambda client=client: client.got == [[b"hi"]])  # type: ignore[misc]
        with pytest.raises(OSError, match="is in use already: stop what listens there, or choose another --port"):
            echo(sockets, [four])
        with pytest.raises(ValueError, match="is not an IP address: resolve the name first"):
            Client(sockets, Address("some.host", 1))

    run(body)


def test_descriptors_of_each_socket_are_few_and_come_back() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def body(sockets: Sockets) -> None:
        echo(sockets)  # the context's own threads start with its first socket
        start = count()
        router, _ = echo(sockets)
        bound = count() - start
        clients = [await Client(sockets, router.addresses[0]).up() for _ in range(10)]
        each = (count() - start - bound) / 10
        assert bound == 4  # listener, ROUTER, its monitor's two ends
        assert each == 5  # both ends of the TCP connection, DEALER, its monitor's two ends
        for client in clients:
            client.link.close()
        router.close()
        await until(lambda: count() == start)

    run(body)


# Keys.

OLD, NEW, OTHER = key(), key(), key()
ROTATION = [[OLD], [OLD, NEW], [NEW, OLD], [NEW]]
ANOTHER = "hung up on this peer's cluster key"


def serve_and_call(server_keys: Sequence[Keypair], client_keys: Sequence[Keypair]) -> tuple[bool, str, dict[str, int]]:
    """(whether a message got through, the first on_down reason, what the server counted)."""
    result: list[Any] = []

    async def main() -> None:
        server, caller = Sockets(Security(tuple(server_keys))), Sockets(Security(tuple(client_keys)))
        try:
            router, got = echo(server)
            client = Client(caller, router.addresses[0])
            client_up = asyncio.ensure_future(client.up())
            await until(lambda: client.downs or client.ups)
            if client.ups:
                client.link.send([b"hi"])
                await until(lambda: client.got)
            else:
                await until(lambda: server.complaints.counts.total())
                assert not got
            client_up.cancel()
            counts = dict(server.complaints.counts)
            result.extend((bool(client.got), client.downs[0] if client.downs else "", counts))
        finally:
            caller.close()
            server.close()

    uvloop.run(main())
    return result[0], result[1], result[2]


@pytest.mark.parametrize(
    ("server", "client"),
    [(server, client) for step, server in enumerate(ROTATION) for client in ROTATION[max(0, step - 1) : step + 2]],
)
def test_every_step_of_a_rotation_connects(server: list[Keypair], client: list[Keypair]) -> None:
    passed, reason, _ = serve_and_call(server, client)
    assert passed, reason


@pytest.mark.parametrize(
    ("server", "client", "why"),
    [
        ([OLD], [OTHER], ANOTHER),
        ([OLD], [], "wants a cluster key, but this peer has none|hung up: if it wants a cluster key"),
        ([], [OLD], f"has no cluster key, but this peer has one|{ANOTHER}: it has another one, or none"),
        ([OLD, NEW], [OTHER], ANOTHER),
    ],
)
def test_a_peer_of_another_key_is_told_and_counted(server: list[Keypair], client: list[Keypair], why: str) -> None:
    passed, reason, counts = serve_and_call(server, client)
    assert not passed
    assert re.match(rf"127\.0\.0\.1:\d+ ({why})", reason)
    assert counts.get("refused-key", 0) + counts.get("abandoned-handshake", 0) >= 1


def test_knowing_the_servers_public_key_is_not_enough(stalled: Callable[[int], Stalled]) -> None:
    async def body(sockets: Sockets) -> None:
        router, got = echo(sockets)
        thief = stalled(zmq.DEALER)
        thief.socket.curve_serverkey = OLD.public
        thief.socket.curve_publickey, thief.socket.curve_secretkey = OTHER.public, OTHER.secret
        thief.socket.connect(router.addresses[0].endpoint)
        thief.socket.send(b"let me in")
        await until(lambda: sockets.complaints.by_source("refused-key").get("127.0.0.1"))
        member = await Client(sockets, router.addresses[0]).up()
        member.link.send([b"hi"])
        await until(lambda: member.got)
        assert [frames[1] for frames in got] == [b"hi"]

    run(body, Security((OLD,)))


def test_raw_garbage_on_the_port_is_counted_and_disturbs_nobody() -> None:
    async def body(sockets: Sockets) -> None:
        router, got = echo(sockets)
        member = await Client(sockets, router.addresses[0]).up()
        for garbage in (
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            os.urandom(5000),
            b"\xff\0\0\0\0\0\0\0\1\x7f\3\0CURVE" + bytes(99),
        ):
            with socket.create_connection(("127.0.0.1", router.addresses[0].port)) as visitor:
                visitor.sendall(garbage)
        await until(lambda: sockets.complaints.counts.total())
        member.link.send([b"hi"])
        await until(lambda: member.got)
        assert len(got) == 1
        assert not member.downs

    run(body, Security((OLD,)))


# Key files and where may be bound.


def test_a_key_file_is_written_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    fingerprint = write_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    security = Security.load(path)
    assert security.fingerprint == fingerprint
    assert len(security.keys) == 1
    assert security.keys[0].secret.decode() not in repr(security)
    with pytest.raises(KeyFileError, match="exists already"):
        write_key_file(path)
    with pytest.raises(KeyFileError, match="No such file"):
        write_key_file(tmp_path / "nowhere" / "key")


def test_a_key_file_holds_one_or_two_keys(tmp_path: Path) -> None:
    lines = []
    for name in "ab":
        write_key_file(tmp_path / name)
        lines.append((tmp_path / name).read_text().splitlines()[-1])
    both = tmp_path / "both"

    def load(text: str) -> Security:
        both.write_text(text)
        both.chmod(0o600)
        return Security.load(both)

    old, new = (Security.load(tmp_path / name) for name in "ab")
    security = load("\n".join(["# old, then new", *lines]))
    assert security.keys == old.keys + new.keys
    assert security.fingerprint == f"{old.fingerprint},{new.fingerprint}"
    for text, why in (
        ("", "holds 0 keys"),
        ("\n".join(lines * 2), "holds 4 keys"),
        ("\n".join([lines[0]] * 2), "the same key twice"),
        (lines[0][:-2], "no cluster key"),
        ("p2pdyn-cluster-key-2 " + "0" * 64, "no cluster key"),
        ("é", "is not a cluster key file"),
    ):
        with pytest.raises(KeyFileError, match=why):
            load(text)
    both.chmod(0o640)
    with pytest.raises(KeyFileError, match="run `chmod 600"):
        Security.load(both)
    with pytest.raises(KeyFileError, match="cannot read"):
        Security.load(tmp_path / "missing")


def test_without_a_key_only_loopback_is_bound() -> None:
    async def body(sockets: Sockets) -> None:
        for host in ("0.0.0.0", "::", "10.1.2.3"):
            with pytest.raises(PermissionError, match="without a cluster key: give --cluster-key FILE"):
                sockets.router([LOCAL, Address(host, 0)], print, max_size=SIZE)

    run(body)
    Security.insecure(allow_remote=True).check_bind(Address("0.0.0.0", 1))
    Security((OLD,)).check_bind(Address("10.1.2.3", 1))
