"""The routes that generate nothing: one connection serves them and the generation routes alike."""

from __future__ import annotations

import asyncio
import socket

import pytest
from support.endpoint import CHAT, Client, endpoint, request, run, until

from p2pdyn.http.settings import Limits

GET = b"GET %b HTTP/1.1\r\nHost: test\r\nx-request-id: %b\r\n\r\n"


def test_answers_keep_the_order_of_pipelined_requests_of_both_kinds() -> None:
    async def main() -> None:
        async with endpoint("--itl-ms", "1") as served, Client(served.port) as client:
            chat = request("/v1/chat/completions", {**CHAT, "max_tokens": 5}, "x-request-id: 2\r\n")
            asked = [
                GET % (b"/live", b"1"),
                chat,
                GET % (b"/v1/models/sim", b"3"),
                GET % (b"/v1/models/x%0ay?z=1", b"4"),
            ]
            await client.send(b"".join([*asked, chat.replace(b"-id: 2", b"-id: 5"), GET % (b"/metrics", b"6")]))
            answers = [await client.answer() for _ in range(6)]
            assert [(int(one.headers["x-request-id"]), one.status) for one in answers] == [
                (1, 200), (2, 200), (3, 200), (4, 404), (5, 200), (6, 200),
            ]  # fmt: skip
            assert answers[2].json()["id"] == "sim"
            assert answers[3].error["code"] in ("model_not_found", "not_found")
            assert answers[5].headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert all("date" in one.headers for one in answers)

    run(main())


def test_head_and_http_1_0() -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            whole = await client.get("/v1/models")
            head = await client.get("/v1/models", method="HEAD")
            assert head.headers["content-length"] == str(len(whole.body))
            assert (await client.get("/live")).json() == {"status": "live"}
            await client.send(b"GET /ready HTTP/1.0\r\n\r\n")
            last = await client.answer()
            assert (last.status, last.headers["connection"]) == (200, "close")
            assert await client.closed()

    run(main())


def test_an_explanation_takes_a_body_and_refuses_what_it_cannot_read() -> None:
    async def main() -> None:
        async with endpoint() as served, Client(served.port) as client:
            for body, code in ((b"[]", "invalid_type"), (b"{", "invalid_json"), ({"model": 1}, "invalid_value")):
                answer = await client.post("/p2p/explain", body)
                assert (answer.status, answer.error["code"]) == (400, code)
            answer = await client.post("/p2p/explain", {"model": "nobody", "prompt": "x"})
            assert (answer.status, answer.error["code"]) == (404, "model_not_found")

    run(main())


def test_a_fault_of_ours_is_json_and_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with endpoint() as served:
            monkeypatch.setattr(served.backend, "peers", lambda: 1 / 0)
            async with Client(served.port) as client:
                answer = await client.get("/p2p/peers")
                assert (answer.status, answer.error["code"]) == (500, "internal_error")
                assert await client.closed()
            assert served.server.metrics.requests[("/p2p/peers", 500)] == 1
            assert "ZeroDivisionError" in caplog.text

    run(main())


def test_an_explanation_ends_when_its_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with endpoint() as served:
            asked: list[object] = []
            monkeypatch.setattr(served.backend, "explain", asked.append, raising=False)  # None: no worker yet
            async with Client(served.port) as client:
                await client.send(request("/p2p/explain", {"model": "sim", "prompt": "x"}))
                await until(lambda: asked, "the explanation waits for a worker")
            tasks = served.server._endpoint.generations._tasks
            await until(lambda: not tasks, "it is given up", 2.0)

    run(main())


def test_answers_that_nobody_reads_are_not_made() -> None:
    async def main() -> None:
        async with endpoint(limits=Limits(slow_bytes=20_000, slow_s=1.0)) as served:
            lazy = socket.socket()
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", served.port))
            lazy.setblocking(False)
            loop = asyncio.get_running_loop()
            sending = asyncio.ensure_future(loop.sock_sendall(lazy, (GET % (b"/metrics", b"x")) * 5000))
            await until(lambda: served.server.metrics.slow_readers == 1, "the reader is cut", 20)
            sending.cancel()
            await asyncio.wait([sending])
            assert served.server.metrics.requests[("/metrics", 200)] < 4000
            lazy.close()

    run(main())
