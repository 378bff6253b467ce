"""Clients that take more than their part: many slow readers, many connections, large bodies, no descriptors left."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from support.endpoint import CHAT, Client, Endpoint, endpoint, request, run, until

from p2pdyn.http.clients import host_of
from p2pdyn.http.descriptors import Descriptors
from p2pdyn.http.settings import Limits

CHAT_PATH = "/v1/chat/completions"
LONG = {**CHAT, "max_tokens": 30_000, "ignore_eos": True}


STREAMED = request(CHAT_PATH, {**LONG, "stream": True})
LARGE = request("/v1/completions", {"model": "sim", "prompt": "x" * 30_000, "echo": True, "n": 16, "max_tokens": 1})
"""Half a megabyte of answer at little cost."""


def lazy_client(port: int, asked: bytes) -> socket.socket:
    """Asks and does not read; its kernel holds little for it."""
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect(("127.0.0.1", port))
    lazy.sendall(asked)
    return lazy


def unread(served: Endpoint) -> int:
    """Bytes that the endpoint holds for its clients."""
    return sum(connection.transport.get_write_buffer_size() for connection in served.server._shared.connections)


def test_many_slow_readers_are_cut_and_what_they_held_is_free_again() -> None:
    async def main() -> None:
        async with endpoint(limits=Limits(slow_bytes=100_000)) as served:
            lazy = [lazy_client(served.port, STREAMED) for _ in range(40)]
            most = 0

            def all_cut() -> bool:
                nonlocal most
                most = max(most, unread(served))
                return bool(served.server.metrics.slow_readers == len(lazy))

            await until(all_cut, "all are cut", 30)
            assert most < len(lazy) * 300_000
            await until(lambda: not served.server._shared.connections, "their connections are gone")
            assert not served.backend.running
            assert served.server.metrics.streams == 0
            async with Client(served.port) as client:
                assert (await client.post(CHAT_PATH, {**CHAT, "max_tokens": 3})).status == 200
            for one in lazy:
                one.close()

    run(main())


def test_a_whole_answer_that_is_never_read_is_cut_in_time() -> None:
    async def main() -> None:
        async with endpoint(limits=Limits(slow_s=0.5, send_buffer=4096)) as served:
            lazy = lazy_client(served.port, LARGE)
            await until(lambda: unread(served) > 0, "the answer is there, unread", 30)
            await until(lambda: served.server.metrics.slow_readers == 1, "the reader is cut")
            await until(lambda: not served.server._shared.connections, "its connection is gone")
            lazy.close()

    run(main())


def test_a_trickle_of_reading_does_not_hold_an_answer_for_ever() -> None:
    async def main() -> None:
        async with endpoint(limits=Limits(slow_s=0.5, read_rate=1_000_000.0, send_buffer=4096)) as served:
            lazy = lazy_client(served.port, LARGE)
            lazy.setblocking(False)
            loop = asyncio.get_running_loop()
            await until(lambda: unread(served) > 0, "the answer is there, unread", 30)
            taken = 0

            async def trickle() -> None:
                nonlocal taken
                while data := await loop.sock_recv(lazy, 512):
                    taken += len(data)
                    await asyncio.sleep(0.02)

            reading = asyncio.ensure_future(trickle())
            await until(lambda: served.server.metrics.slow_readers == 1, "the reader is cut", 20)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            assert taken > 512  # it went on reading all the time
            lazy.close()

    run(main())


def test_a_reader_that_is_slow_and_steady_gets_all_of_it() -> None:
    async def main() -> None:
        limits = Limits(slow_s=0.5, read_rate=50_000.0, send_buffer=4096)
        async with endpoint(limits=limits) as served, Client(served.port, limit=16_384) as client:
            await client.send(LARGE)
            await until(lambda: unread(served) > 0, "the answer is there", 30)
            got = b""
            while len(got) < 400_000:
                got += await asyncio.wait_for(client.reader.readexactly(8_192), 10)
                await asyncio.sleep(0.02)
            assert served.server.metrics.slow_readers == 0

    run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_closed_its_side_has_left(stream: bool) -> None:
    """A close and a half-close look the same until something is written, and a worker is worth more than the latter."""

    async def main() -> None:
        async with endpoint("--itl-ms", "5") as served, Client(served.port) as client:
            await client.send(request(CHAT_PATH, {**LONG, "stream": stream}))
            await until(lambda: len(served.backend.running) == 1, "it runs")
            client.writer.write_eof()
            await until(lambda: not served.backend.running, "it is cancelled", 1.0)
            await until(lambda: not served.server._shared.connections, "nothing is held for it", 1.0)

    run(main())


def test_one_host_leaves_connections_to_the_others() -> None:
    async def main() -> None:
        async with endpoint(limits=Limits(connections=40)) as served, AsyncExitStack() as stack:

            async def connect(host: str) -> int:
                """The status of a first answer on a connection that stays open."""
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port, local_addr=(host, 0))
                stack.callback(writer.close)
                writer.write(b"GET /live HTTP/1.1\r\n\r\n")
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                return int(head.split()[1])

            greedy = [await connect("127.0.0.1") for _ in range(50)]
            assert greedy == [200] * 30 + [503] * 20
            assert [await connect("127.0.0.2") for _ in range(4)] == [200] * 4
            assert await connect("127.0.0.1") == 503
            assert served.server.metrics.refused_connections == 21

    run(main())


def test_bodies_held_are_bounded_in_all_and_each_client_leaves_room() -> None:
    body = {"model": "sim", "prompt": "x" * 20_000, "max_tokens": 10_000, "ignore_eos": True}

    async def main() -> None:
        async with endpoint("--itl-ms", "20", limits=Limits(held_bytes=55_000)) as served, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(served.port)) for _ in range(3)]
            for client in clients[:2]:
                await client.send(request("/v1/completions", body))
            await until(lambda: len(served.backend.running) == 2, "two are taken")
            answer = await clients[2].post("/v1/completions", body)
            assert (answer.status, answer.error["code"]) == (503, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
            clients[0].writer.close()
            await until(lambda: len(served.backend.running) == 1, "one has left")
            async with Client(served.port) as again:
                assert (await again.post("/v1/completions", {**body, "max_tokens": 1})).status == 200
            clients[1].writer.close()
            await until(lambda: served.server._shared.bodies.total == 0, "all is given back")

    run(main())


def test_refusals_for_want_of_descriptors_are_said_once_with_the_mend(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "p2pdyn")
    descriptors = Descriptors(spare=10)
    last = descriptors.limit - 1
    assert not descriptors.short(last - 10, 0.0)
    assert descriptors.short(last, 1.0)
    assert descriptors.short(last, 2.0)
    descriptors.look(4.0)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "ulimit -n" in caplog.text
    descriptors.look(8.0)
    assert "2 connections were refused" in caplog.text
    descriptors.look(20.0)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        (("10.1.2.3", 4), "10.1.2.3"),
        (("::ffff:10.1.2.3", 4, 0, 0), "10.1.2.3"),
        (("2001:db8:1:2:3:4:5:6", 4, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 4, 0, 2), "fe80::/64"),
        ("", ""),
        (None, ""),
    ],
)
def test_an_ipv6_host_is_its_network(peer: Any, host: str) -> None:
    assert host_of(peer) == host


def test_a_job_names_its_client_by_key_or_by_address(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key-1\nsecond-key-2\n")

    async def clients(*headers: str, **settings: Any) -> list[str]:
        async with endpoint(**settings) as served, Client(served.port) as client:
            for header in headers:
                assert (await client.post(CHAT_PATH, {**CHAT, "max_tokens": 1}, header)).status == 200
            return [job.client for job in served.backend.jobs]

    assert run(clients("", "Authorization: Bearer whatever\r\n")) == ["127.0.0.1"] * 2
    with_keys = [f"Authorization: Bearer {key}\r\n" for key in ("first-key-1", "second-key-2", "first-key-1")]
    first, second, again = run(clients(*with_keys, api_key_file=keys))
    assert first == again != second
    assert "first-key" not in first


def test_collected_by_reference_count_alone() -> None:
    """What a connection held goes with it, not at some collection later."""

    async def main() -> None:
        async with endpoint() as served:
            gc.collect()
            gc.disable()
            try:
                for _ in range(5):
                    async with Client(served.port) as client:
                        assert (await client.post(CHAT_PATH, {**CHAT, "max_tokens": 3, "stream": True})).status == 200
                await until(lambda: not served.server._shared.connections, "they are gone")
                left = [one for one in gc.get_objects() if str(type(one).__module__).startswith("p2pdyn.http.")]
                kinds = {type(one).__name__ for one in left}
                assert not kinds & {"Connection", "Exchange", "Reply", "StreamedChoice"}
            finally:
                gc.enable()

    run(main())
