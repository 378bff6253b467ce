"""An endpoint that is to go: nothing new is let in, what is open goes on, connections close behind their answers."""

from __future__ import annotations

from support.endpoint import CHAT, Client, endpoint, request, run, until

GENERATE = "/v1/chat/completions"


def test_new_generations_are_refused_on_open_connections_and_on_new_ones() -> None:
    async def main() -> None:
        async with endpoint() as server, Client(server.port) as known:
            assert (await known.post(GENERATE, {**CHAT, "max_tokens": 2})).status == 200
            server.server.drain()
            async with Client(server.port) as new:
                for client in (known, new):
                    answer = await client.post(GENERATE, CHAT)
                    assert (answer.status, answer.error["code"]) == (503, "draining")
                    assert (answer.headers["connection"], answer.headers["retry-after"]) == ("close", "1")
                    assert await client.closed()
            await until(lambda: server.server.open == 0, "nothing open")

    run(main())


def test_what_is_open_goes_on_and_its_connection_closes() -> None:
    async def main() -> None:
        async with endpoint("--itl-ms", "20") as server, Client(server.port) as client:
            await client.send(request(GENERATE, {**CHAT, "max_tokens": 20, "stream": True}))
            await until(lambda: server.server.open == 1, "the request has come")
            server.server.drain()
            answer = await client.answer()
            assert len(answer.events) == 21
            assert answer.body.rstrip().endswith(b"[DONE]")
            assert await client.closed()
            await until(lambda: server.server.open == 0, "nothing open")

    run(main())


def test_what_generates_nothing_is_still_answered() -> None:
    async def main() -> None:
        async with endpoint() as server:
            server.server.drain()
            for path in ("/v1/models", "/metrics", "/live"):
                async with Client(server.port) as client:
                    answer = await client.get(path)
                    assert (answer.status, answer.headers["connection"]) == (200, "close")
                    assert await client.closed()

    run(main())
