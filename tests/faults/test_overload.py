"""A running cluster with too much to do: others' turns, no descriptors left, memory over many requests."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from support.endpoint import until
from support.nodes import Cluster, NodeProcess, wait_for

FLOOD = 150
SLOTS = 4
LIMIT = 128
LIMITED = (
    sys.executable,
    "-c",
    f"import resource, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT})); "
    "runpy.run_module('p2pdyn', run_name='__main__', alter_sys=True)",
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as nodes:
        yield nodes


def address(node: NodeProcess) -> tuple[str, int]:
    where = urlsplit(node.url)
    return where.hostname or "", where.port or 0


def request(prompt: str, tokens: int, *, stream: bool = True) -> bytes:
    asked = {"model": "sim", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    body = json.dumps(asked).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@dataclass
class Clients:
    """Of one endpoint; ``ended`` counts answers, of all of them."""

    host: str
    port: int
    ended: int = 0

    async def ask(self, source: str, name: str) -> tuple[int, str, int]:
        """Status, Retry-After, and how many others had their answer between the request and its first token."""
        reader, writer = await asyncio.open_connection(self.host, self.port, local_addr=(source, 0))
        try:
            began = self.ended
            writer.write(request(name, 20))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head.split(b" ", 2)[1])
            if status != 200:
                return status, head.partition(b"retry-after: ")[2].partition(b"\r\n")[0].decode(), 0
            await reader.readuntil(b"data: ")
            before = self.ended - began
            await reader.readuntil(b"data: [DONE]")
            self.ended += 1
            return status, "", before
        finally:
            writer.close()


@pytest.mark.alone
def test_a_flood_by_one_client_does_not_hold_up_another(cluster: Cluster) -> None:
    frontend = cluster.frontend("frontend")
    worker = cluster.worker("worker", "--", "--max-num-seqs", str(SLOTS), "--itl-ms", "5", seeds=[frontend])

    async def main() -> None:
        clients = Clients(*address(frontend))
        assert (await clients.ask("127.0.0.2", "the links open with it"))[0] == 200
        flood = [asyncio.ensure_future(clients.ask("127.0.0.1", f"flood {i}")) for i in range(FLOOD)]
        await until(lambda: clients.ended >= 5, "the flood is under way")
        modest = [await clients.ask("127.0.0.2", f"modest {i}") for i in range(5)]
        assert [status for status, _, _ in modest] == [200] * 5
        # What runs, and the supply that its worker holds, is ahead of it: not the 150.
        assert max(before for _, _, before in modest) <= SLOTS + 32 + 4
        answers = await asyncio.gather(*flood)
        assert {status for status, _, _ in answers} <= {200, 429}
        assert all(int(retry) >= 1 for status, retry, _ in answers if status == 429)
        assert sum(status == 200 for status, _, _ in answers) >= 64
        assert (await clients.ask("127.0.0.1", "and all is well again"))[::2] == (200, 0)

    asyncio.run(asyncio.wait_for(main(), 50))
    # docs/design/wire.md: of two peers, a frontend with a link to one worker, and that worker.
    peer = 30 + 6 + 5 + 4 + 1
    wait_for(lambda: psutil.Process(frontend.process.pid).num_fds() <= peer + 8, 10, "few descriptors")
    assert psutil.Process(worker.process.pid).num_fds() <= peer + 8 + 2


def test_without_descriptors_new_clients_are_refused_and_all_else_goes_on(cluster: Cluster) -> None:
    frontend = cluster.start("frontend", "--http", "127.0.0.1:0", engine="none", program=LIMITED).wait_ready()
    cluster.worker("worker", "--", "--itl-ms", "20", seeds=[frontend])
    where = address(frontend)
    with ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(where, 10))

        def answered() -> bool:
            """A new client gets its answer."""
            with socket.create_connection(where, 10) as client:
                client.sendall(request("hello", 1, stream=False))
                return client.recv(12) == b"HTTP/1.1 200"

        wait_for(answered, 10, "it serves")
        streaming = connect()
        streaming.sendall(request("a long story", 20_000))
        assert streaming.recv(12) == b"HTTP/1.1 200"
        idle = [connect() for _ in range(2 * LIMIT)]
        said = "out of file descriptors"
        wait_for(lambda: said in frontend.stderr, 10, "it says so")
        assert not answered()
        assert psutil.Process(frontend.process.pid).num_fds() < LIMIT
        # No busy loop, and the stream goes on.
        before, began = sum(psutil.Process(frontend.process.pid).cpu_times()[:2]), time.monotonic()
        streamed = 0
        while streamed < 20_000:
            streamed += len(streaming.recv(4096))
        spent = sum(psutil.Process(frontend.process.pid).cpu_times()[:2]) - before
        assert spent < 0.8 * (time.monotonic() - began)
        for one in idle:
            one.close()
        wait_for(answered, 10, "it serves again")
    wait_for(lambda: "file descriptors are free again" in frontend.stderr, 15, "it says that it is over")
    assert frontend.stderr.count(said) == 1
    assert "ulimit -n" in frontend.stderr


@pytest.mark.alone
def test_memory_growth_is_measured_over_every_kind_of_end(tmp_path: Path) -> None:
    """The quick form of bench/memory_growth.py: all answers as expected; so short a run says nothing of growth."""
    bench = Path(__file__).resolve().parents[2] / "bench" / "memory_growth.py"
    command = [sys.executable, str(bench), "--requests", "600", "--warm-up", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["requests"] == 600
    assert {kind.split()[0] for kind in found["outcomes"]} == {"streamed", "whole", "aborted", "refused"}
    assert len(found["workers"]) == 2
