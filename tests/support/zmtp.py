"""Strangers at a ZeroMQ port, byte by byte: what a peer of another cluster, a scanner or an attacker may send, and a
tap that records a member's handshake so that it can be replayed. ZMTP 3.1 (RFC 37), CURVE (RFC 25)."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import zmq

from p2pdyn.net.curve import Keypair

Where = tuple[str, int]
"""Host and port."""


def greeting(mechanism: bytes = b"CURVE", as_server: bool = False, version: bytes = b"\3\1") -> bytes:
    return b"\xff" + bytes(7) + b"\1\x7f" + version + mechanism.ljust(20, b"\0") + bytes([as_server]) + bytes(31)


def command(name: bytes, body: bytes) -> bytes:
    data = bytes([len(name)]) + name + body
    if len(data) < 256:
        return b"\4" + bytes([len(data)]) + data
    return b"\6" + struct.pack(">Q", len(data)) + data


def _hello(version: bytes = b"\1\0") -> bytes:
    return command(b"HELLO", version + bytes(72) + os.urandom(32 + 8 + 80))


HANDSHAKES: Mapping[str, Callable[[], bytes]] = {
    "no mechanism (NULL)": lambda: greeting(b"NULL") + command(b"READY", b""),
    "PLAIN with a password": lambda: greeting(b"PLAIN") + command(b"HELLO", b"\4user\4pass"),
    "a mechanism that does not exist": lambda: greeting(b"GSSAPI"),
    "HELLO whose box no key made": _hello,
    "a client that says it is the server": lambda: greeting(as_server=True) + _hello(),
    "HELLO cut short": lambda: greeting() + command(b"HELLO", b"x"),
    "HELLO of CurveZMQ 9.0": lambda: greeting() + _hello(b"\x09\0"),
    "INITIATE before HELLO": lambda: greeting() + command(b"INITIATE", os.urandom(400)),
    "MESSAGE before the handshake": lambda: greeting() + command(b"MESSAGE", os.urandom(40)),
    "a plain frame before the handshake": lambda: greeting() + b"\0\5hello",
    "an empty frame": lambda: greeting() + b"\0\0",
    "an empty command": lambda: greeting() + b"\4\0",
    "a command name longer than its frame": lambda: greeting() + b"\4\3\xffab",
    "an ERROR command": lambda: greeting() + command(b"ERROR", b"\3bad"),
    "a command of 1 MiB": lambda: greeting() + b"\6" + struct.pack(">Q", 2**20) + bytes(2**20),
    "a command that claims 2^40 bytes": lambda: greeting() + b"\6" + struct.pack(">Q", 2**40) + bytes(5000),
    "a command that claims 2^63 - 1 bytes": lambda: greeting() + b"\6" + struct.pack(">Q", 2**63 - 1) + bytes(5000),
    "a command that claims 2^64 - 1 bytes": lambda: greeting() + b"\6" + struct.pack(">Q", 2**64 - 1) + bytes(5000),
    "ZMTP 1.0": lambda: b"\1\0\2\0a",
    "ZMTP 2.0": lambda: b"\xff" + bytes(8) + b"\x7f\1\5\0\0",
    "HTTP": lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a TLS ClientHello": lambda: bytes.fromhex("1603010200010001fc0303") + os.urandom(500),
    "noise": lambda: os.urandom(3000),
}
"""Each sent whole on a connection of its own; every one must end in a hang-up."""


def knock(where: Where, data: bytes, wait_s: float = 10.0) -> str:
    """Send ``data`` on a new connection and read to its end: "closed", or "open" if it is not ended in ``wait_s``."""
    until = time.monotonic() + wait_s
    with socket.create_connection(where, timeout=wait_s) as visitor:
        with contextlib.suppress(ConnectionError):
            visitor.sendall(data)
            while (left := until - time.monotonic()) > 0:
                visitor.settimeout(left)
                try:
                    if not visitor.recv(65536):
                        return "closed"
                except TimeoutError:
                    return "open"
            return "open"
        return "closed"


def call(where: Where, server: Keypair | None, own: Keypair | None, wait_s: float = 1.0) -> bool:
    """Whether a real client that has ``server``'s public key and ``own`` pair (None: no CURVE) is let in within
    ``wait_s``: a connection is only told of by then. It has a message to say as soon as it is."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger, client.immediate = 0, 1
        if server is not None and own is not None:
            client.curve_serverkey, client.curve_publickey, client.curve_secretkey = (
                server.public, own.public, own.secret,
            )  # fmt: skip
        client.connect(f"tcp://{where[0]}:{where[1]}")
        return bool(client.poll(int(wait_s * 1000), zmq.POLLOUT))


def record_handshake(where: Where, key: Keypair, message: Sequence[bytes]) -> bytes:
    """What a member that connects and says ``message`` sends, all of it, taken down by a tap on the way. It says it as
    whatever the port talks to: requests and control to a DEALER, events to an XSUB."""
    for kind in (zmq.DEALER, zmq.XSUB):
        said = _record(where, key, kind, message)
        if said:
            return said
    raise AssertionError("the member was not let in")


def _record(where: Where, key: Keypair, kind: int, message: Sequence[bytes]) -> bytes:
    with Tap(where) as tap, zmq.Context() as context, context.socket(kind) as member:
        member.linger, member.immediate = 1000, 1
        member.curve_serverkey, member.curve_publickey, member.curve_secretkey = key.public, key.public, key.secret
        member.connect(f"tcp://127.0.0.1:{tap.port}")
        if not member.poll(1000, zmq.POLLOUT):
            return b""
        before = len(tap.said)
        member.send_multipart(message if kind == zmq.DEALER else [b"\1K"])
        deadline = time.monotonic() + 2
        while len(tap.said) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        return bytes(tap.said)


class Tap:
    """A TCP proxy of one connection that keeps what the client said, in ``said``."""

    def __init__(self, where: Where) -> None:
        self.said = bytearray()
        self._where = where
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._listener.settimeout(5)
        with (
            contextlib.suppress(OSError),
            self._listener.accept()[0] as client,
            socket.create_connection(self._where, timeout=5) as server,
            selectors.DefaultSelector() as ready,
        ):
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while not self._stop.is_set():
                for key, _ in ready.select(0.05):
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if not data:
                        return
                    if key.fileobj is client:
                        self.said += data
                    key.data.sendall(data)

    def __enter__(self) -> Tap:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()
