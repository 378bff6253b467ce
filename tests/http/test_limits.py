"""Clients that are slow, large, many, or no HTTP clients at all: each gets its answer, and nobody else notices."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from support.endpoint import CHAT, Client, endpoint, request, run, until

from p2pdyn.http.settings import Limits

CHAT_PATH = "/v1/chat/completions"
QUICK = Limits(header_s=0.4, body_s=0.4, linger_s=0.3, idle_s=0.4, slow_s=0.5)


def test_malformed_http_gets_json_and_the_connection_closes() -> None:
    async def main() -> None:
        async with endpoint() as served:
            for garbage in (
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
                b"GET / SPDY/9\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                b"GET /live HTTP/1.1\r\nbad header\r\n\r\n",
                b"GET /live HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
                b"CONNECT example.org:443 HTTP/1.1\r\n\r\n",
            ):
                async with Client(served.port) as client:
                    await client.send(garbage)
                    answer = await client.answer()
                    assert answer.status == 400, garbage
                    assert answer.error["code"] == "bad_http"
                    assert await client.closed()
            async with Client(served.port) as client:
                assert (await client.get("/live")).status == 200

    run(main())


def test_unknown_paths_methods_and_lengths_are_refused_before_the_body() -> None:
    async def main() -> None:
        async with endpoint() as served:

            async def ask(head: str) -> Any:
                async with Client(served.port) as client:
                    await client.send(head.encode())
                    return await client.answer()

            missing = await ask("POST /v1/nothing HTTP/1.1\r\nContent-Length: 9\r\nx-request-id: mine-1\r\n\r\n")
            assert (missing.status, missing.headers["x-request-id"]) == (404, "mine-1")
            assert missing.error["code"] == "not_found"
            wrong = await ask("GET /v1/completions HTTP/1.1\r\n\r\n")
            assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
            assert (await ask("DELETE /v1/models HTTP/1.1\r\n\r\n")).status == 405
            assert (await ask("POST /v1/completions HTTP/1.1\r\n\r\n")).status == 411
            large = await ask("POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n")
            assert (large.status, large.error["code"]) == (413, "body_too_large")
            packed = "POST /v1/completions HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\n"
            assert (await ask(packed)).status == 400

    run(main())


def test_a_client_that_sends_50_mb_anyway_still_reads_its_413() -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            client.writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 52428800\r\n\r\n")
            for _ in range(50):
                client.writer.write(bytes(2**20))
            assert (await client.answer()).status == 413

    run(main())


def test_a_chunked_body_is_stopped_at_the_limit() -> None:
    async def main() -> None:
        async with endpoint(limits=Limits(body_bytes=10_000)) as served, Client(served.port) as client:
            await client.send(b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(11):
                await client.send(b"400\r\n" + b"x" * 1024 + b"\r\n")
            assert (await client.answer()).status == 413

    run(main())


@pytest.mark.parametrize("whole", [True, False])
def test_a_flood_of_headers_is_431(whole: bool) -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            flood = b"GET /live HTTP/1.1\r\n" + b"x-flood: " + b"y" * 40_000
            await client.send(flood + (b"\r\n\r\n" if whole else b""))
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (431, "header_too_large")
            assert await client.closed()

    run(main())


def test_slow_headers_and_slow_bodies_are_408_at_the_deadline() -> None:
    async def main() -> None:
        async with endpoint(limits=QUICK) as served:
            for start in (
                b"GET /live HTTP/1.1\r\nx: ",
                b"POST /v1/completions HTTP/1.1\r\nContent-Length: 900\r\n\r\n{",
            ):
                async with Client(served.port) as client:
                    began = asyncio.get_running_loop().time()
                    await client.send(start)
                    dripping = asyncio.ensure_future(drip(client))
                    answer = await client.answer()
                    dripping.cancel()
                    assert (answer.status, answer.error["type"]) == (408, "timeout_error")
                    assert asyncio.get_running_loop().time() - began < 5

    run(main())


async def drip(client: Client) -> None:
    while True:
        await asyncio.sleep(0.05)
        await client.send(b"y")


def test_500_idle_sockets_are_closed_and_disturb_nobody() -> None:
    async def main() -> None:
        async with endpoint(limits=Limits(header_s=1.0)) as served:
            idle = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(500)]
            async with Client(served.port) as client:
                assert (await client.post(CHAT_PATH, {**CHAT, "max_tokens": 4})).status == 200
            for reader, writer in idle:
                assert await asyncio.wait_for(reader.read(), 10) == b""
                writer.close()
                await writer.wait_closed()

    run(main())


def test_beyond_the_connection_cap_is_503_with_retry_after() -> None:
    async def main() -> None:
        async with endpoint(limits=Limits(connections=2)) as served:
            async with Client(served.port) as one, Client(served.port) as two:
                assert (await one.get("/live")).status == 200
                assert (await two.get("/live")).status == 200
                async with Client(served.port) as three:
                    answer = await three.answer()
                    assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
                    assert answer.headers["retry-after"] == "1"
            async with Client(served.port) as again:
                await until(lambda: len(served.server._shared.connections) == 1, "the others are gone")
                assert (await again.get("/live")).status == 200

    run(main())


def test_a_connection_is_used_again_and_closed_when_idle() -> None:
    async def main() -> None:
        async with endpoint(limits=QUICK) as served, Client(served.port) as client:
            for _ in range(3):
                assert (await client.post(CHAT_PATH, {**CHAT, "max_tokens": 2})).status == 200
            assert await client.closed()

    run(main())


def test_pipelined_requests_are_answered_in_order_and_a_bad_one_behind_them() -> None:
    async def main() -> None:
        async with endpoint("--itl-ms", "1") as served, Client(served.port) as client:
            parts = [
                request("/v1/completions", {"model": "sim", "prompt": f"p{i}", "max_tokens": 20 - i}) for i in range(20)
            ]
            await client.send(b"".join(parts) + b"rubbish\r\n\r\n")
            counts = [(await client.answer()).json()["usage"]["completion_tokens"] for _ in range(19 + 1)]
            assert counts == [20 - i for i in range(20)]
            assert (await client.answer()).status == 400
            assert await client.closed()

    run(main())


def test_a_body_is_invited_only_if_it_will_be_read() -> None:
    async def main() -> None:
        async with endpoint() as served:
            expect = b"HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
            async with Client(served.port) as client:
                body = request("/v1/completions", {"model": "sim", "prompt": "x"}).partition(b"\r\n\r\n")[2]
                await client.send(b"POST /v1/completions " + expect % len(body))
                assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                await client.send(body)
                assert (await client.answer()).status == 200
            async with Client(served.port) as client:
                await client.send(b"POST /v1/completions " + expect % 99_999_999)
                assert (await client.answer()).status == 413

    run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_work_at_once(stream: bool) -> None:
    async def main() -> None:
        async with endpoint("--itl-ms", "5") as served:
            async with Client(served.port) as client:
                await client.send(request(CHAT_PATH, {**CHAT, "stream": stream, "n": 2, "max_tokens": 30_000}))
                await until(lambda: len(served.backend.running) == 2, "both choices run")
            await until(lambda: not served.backend.running, "both are cancelled", 1.0)
            assert len(served.backend.cancelled) == 2
            assert served.server.metrics.streams == 0

    run(main())


@pytest.mark.parametrize("how", ["bytes", "seconds"])
def test_a_reader_too_far_behind_is_cut_and_its_work_cancelled(how: str) -> None:
    limits = Limits(slow_bytes=50_000) if how == "bytes" else Limits(slow_bytes=2**30, slow_s=0.5)

    async def main() -> None:
        async with endpoint(limits=limits) as served:
            lazy = socket.socket()
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", served.port))
            lazy.sendall(request(CHAT_PATH, {**CHAT, "stream": True, "max_tokens": 30_000}))
            await until(lambda: served.server.metrics.slow_readers == 1, "the reader is cut", 20)
            await until(lambda: not served.backend.running, "its work is cancelled", 1.0)
            lazy.close()

    run(main())


def test_http_1_0_gets_an_unframed_stream_and_a_close() -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            asked = request("/v1/completions", {"model": "sim", "prompt": "x", "max_tokens": 3, "stream": True})
            await client.send(asked.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            answer = await client.answer()
            assert "transfer-encoding" not in answer.headers
            assert len(answer.events) == 4

    run(main())


def test_metrics_count_what_was_answered() -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            await client.post(CHAT_PATH, {**CHAT, "max_tokens": 7, "stream": True})
            await client.post(CHAT_PATH, {**CHAT, "max_tokens": 0})
            text = (await client.get("/metrics")).body.decode()
            assert 'p2pdyn_http_requests_total{path="/v1/chat/completions",code="200"} 1\n' in text
            assert 'p2pdyn_http_requests_total{path="/v1/chat/completions",code="400"} 1\n' in text
            assert "p2pdyn_http_output_tokens_total 7\n" in text
            assert "p2pdyn_http_ttft_seconds_count 1\n" in text
            assert 'p2pdyn_test{worker="a\\"b"} 1\n' in text
            assert (await client.get("/metrics", method="HEAD")).status == 200
            assert (await client.get("/p2p/peers")).json()["cluster"] == "test"

    run(main())
