"""A process that runs out of file descriptors: said once, nothing breaks, nothing leaks, and it comes back."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from p2pdyn.core.types import Address, NodeId
from p2pdyn.net.curve import Security
from p2pdyn.net.link import Link
from p2pdyn.net.pool import Pool
from p2pdyn.net.sockets import Sockets
from p2pdyn.net.worker_link import WorkerLink
from p2pdyn.wire.requests import Hello


def descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


@contextmanager
def few_left(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_sockets_say_what_is_missing_and_work_again_when_it_is_there(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "p2pdyn")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        sockets = Sockets(Security.insecure(allow_remote=False))
        server = sockets.router([Address("127.0.0.1", 0)], lambda frames: None, max_size=1000)
        address = server.addresses[0]
        await asyncio.sleep(0)
        links: list[Link] = []

        def worker_link() -> WorkerLink:
            hello, worker = Hello(NodeId("a" * 16), 1), NodeId("b" * 16)
            return WorkerLink(
                *(sockets, hello, worker, 1, address, address),
                on_up=lambda link: None,
                on_down=lambda link, reason: None,
                on_message=lambda link, message: None,
            )

        def open_more() -> None:
            while len(links) < 200:
                links.append(sockets.dealer(address, lambda frames: None, max_size=1000))

        with few_left(5):
            with pytest.raises(OSError, match="ulimit -n"):
                open_more()
            for _ in range(20):  # whatever a failed attempt had opened is closed again
                with pytest.raises(OSError, match="ulimit -n"):
                    worker_link()
            pool = Pool(sockets, lambda peer, frames: None, lambda peer, reason: None)
            pool.send(address, (b"x",))
            assert pool.unsent == 1
        assert sockets.complaints.counts["out-of-descriptors"] > 20
        assert caplog.text.count("out of file descriptors") == 1
        up: asyncio.Future[None] = loop.create_future()
        sockets.dealer(address, lambda frames: None, max_size=1000, on_up=lambda: up.set_result(None))
        await asyncio.wait_for(up, 10)
        pool.close()
        sockets.close()

    asyncio.run(main())
