"""The ZAP handler (RFC 27): which CURVE clients are let in.

It is a REP socket on the event loop, no thread.  libzmq asks from its I/O thread without waiting, and the handshake
goes on when the answer comes, so a busy loop delays a newcomer and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import zmq

from p2pdyn.net.complaints import Complaints
from p2pdyn.net.curve import Keypair, raw_public
from p2pdyn.net.link import BATCH, Pump, read_message

DOMAIN = b"p2pdyn"


class ZapHandler:
    """Lets in exactly the clients that prove one of ``keys``. Must exist before the context's first bind."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: tuple[Keypair, ...],
        complaints: Complaints,
    ) -> None:
        self.let_in(keys)
        self._complaints = complaints
        self._socket = context.socket(zmq.REP)
        self._socket.bind("inproc://zeromq.zap.01")
        self._pump = Pump(loop, self._socket, self._drain)

    def let_in(self, keys: Sequence[Keypair]) -> None:
        """From now on, of those who connect."""
        self._accepted = frozenset(raw_public(key) for key in keys)

    def _drain(self) -> bool:
        for _ in range(BATCH):
            request = read_message(self._socket)
            if request is None:
                return False
            self._socket.send_multipart(self._answer(request[1]), zmq.DONTWAIT)
        return True

    def _answer(self, request: list[bytes]) -> list[bytes]:
        version, sequence, domain, address, _identity, mechanism, *credentials = [
            *request,
            b"",
            b"",
            b"",
            b"",
            b"",
            b"",
        ]
        if domain == DOMAIN and mechanism == b"CURVE" and credentials[0] in self._accepted:
            return [version, sequence, b"200", b"OK", b"", b""]
        source = address.decode("ascii", "replace")
        self._complaints.add("refused-key", source, f"turned away {source}: it has another cluster key")
        return [version, sequence, b"400", b"not a key of this cluster", b"", b""]

    def close(self) -> None:
        self._pump.close()
        self._socket.close(linger=0)
