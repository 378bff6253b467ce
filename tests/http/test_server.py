"""Binding, TLS and stopping."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from pathlib import Path

import pytest
from support.endpoint import CHAT, Client, endpoint, request, run, until
from support.local_backend import LocalBackend

from p2pdyn.core.types import Address
from p2pdyn.http.keys import ApiKeys
from p2pdyn.http.server import HttpServer, HttpSettings


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += [
        "-subj",
        f"/CN={name}",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-out",
        str(cert),
        "-keyout",
        str(key),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


async def peer_name(port: int, cert: Path) -> bytes:
    """Ask over TLS, trusting ``cert`` only, and give the answer's first line."""
    trust = ssl.create_default_context(cafile=str(cert))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust)
    writer.write(b"GET /live HTTP/1.1\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    await writer.wait_closed()
    return answer.partition(b"\r\n")[0]


def test_tls_serves_and_a_renewed_certificate_is_taken_at_reload(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "first")
    new_cert, new_key = certificate(tmp_path, "second")

    async def main() -> None:
        async with endpoint(tls_cert=cert, tls_key=key) as served:
            assert served.url.startswith("https://")
            assert await peer_name(served.port, cert) == b"HTTP/1.1 200 OK"
            old = cert.read_bytes()
            cert.write_bytes(new_cert.read_bytes())
            with pytest.raises(ValueError, match="cannot be used"):
                served.server.reload()  # the key does not fit yet
            cert.write_bytes(old)
            assert await peer_name(served.port, cert) == b"HTTP/1.1 200 OK"
            cert.write_bytes(new_cert.read_bytes())
            key.write_bytes(new_key.read_bytes())
            served.server.reload()
            assert await peer_name(served.port, new_cert) == b"HTTP/1.1 200 OK"

    run(main())


def test_tls_and_keys_are_replaced_under_load_and_open_streams_go_on(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "first")
    new_cert, new_key = certificate(tmp_path, "second")
    keys = tmp_path / "keys"
    keys.write_text("the-old-key\n")
    headers = "Host: x\r\nContent-Length: {}\r\nAuthorization: Bearer {}\r\nConnection: close\r\n\r\n"
    body = json.dumps({**CHAT, "max_tokens": 60, "stream": True}).encode()

    async def stream(port: int, trusted: Path, api_key: str, begun: asyncio.Event | None = None) -> bytes:
        trust = ssl.create_default_context(cafile=str(trusted))
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust)
        head = "POST /v1/chat/completions HTTP/1.1\r\n" + headers.format(len(body), api_key)
        writer.write(head.encode() + body)
        answer = await reader.readline()
        if begun is not None:
            begun.set()
        answer += await asyncio.wait_for(reader.read(), 20)
        writer.close()
        await writer.wait_closed()
        return answer

    async def main() -> None:
        async with endpoint("--itl-ms", "10", tls_cert=cert, tls_key=key, api_key_file=keys) as served:
            begun = [asyncio.Event() for _ in range(4)]
            old = [asyncio.create_task(stream(served.port, cert, "the-old-key", one)) for one in begun]
            for one in begun:
                await one.wait()
            cert.write_bytes(new_cert.read_bytes())
            key.write_bytes(new_key.read_bytes())
            keys.write_text("the-new-key\nanother-key\n")
            served.server.reload()
            fresh = await stream(served.port, new_cert, "the-new-key")
            assert b"data: [DONE]" in fresh
            assert (await stream(served.port, new_cert, "the-old-key")).startswith(b"HTTP/1.1 401")
            assert (await stream(served.port, new_cert, "another-key")).startswith(b"HTTP/1.1 200")
            with pytest.raises(ssl.SSLCertVerificationError):
                await stream(served.port, tmp_path / "first-copy.crt", "the-new-key")
            for answer in await asyncio.gather(*old):
                assert b"data: [DONE]" in answer

    (tmp_path / "first-copy.crt").write_bytes(cert.read_bytes())
    run(main())


def test_a_taken_port_and_unusable_files_are_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with endpoint() as served:
            backend = LocalBackend()
            with pytest.raises(OSError, match="the port is taken"):
                await HttpServer(backend, HttpSettings(Address("127.0.0.1", served.port))).start()
            with pytest.raises(ValueError, match="TLS needs both"):
                HttpServer(backend, HttpSettings(Address("127.0.0.1", 0), tls_cert=tmp_path / "x"))

    run(main())
    keys = tmp_path / "keys"
    for content, reason in (("# none\n", "holds no key"), ("short\n", "shorter than")):
        keys.write_text(content)
        with pytest.raises(ValueError, match=reason):
            ApiKeys(keys)


def test_stopping_lets_an_open_answer_end_and_closes_the_rest() -> None:
    async def main() -> None:
        async with endpoint("--itl-ms", "5") as served, Client(served.port) as busy, Client(served.port) as idle:
            assert (await idle.get("/live")).status == 200
            await busy.send(request("/v1/chat/completions", {**CHAT, "max_tokens": 40, "stream": True}))
            await until(lambda: served.backend.running, "it runs")
            stopping = asyncio.ensure_future(served.server.stop(10))
            assert await idle.closed()
            answer = await busy.answer()
            assert len(answer.events) == 41
            assert await busy.closed()
            await stopping

    run(main())


def test_stopping_without_patience_cancels_what_still_runs() -> None:
    async def main() -> None:
        async with endpoint("--itl-ms", "5") as served, Client(served.port) as busy:
            await busy.send(request("/v1/chat/completions", {**CHAT, "max_tokens": 30_000, "stream": True}))
            await until(lambda: served.backend.running, "it runs")
            await served.server.stop(0.05)
            assert not served.backend.running

    run(main())
