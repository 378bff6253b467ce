"""Prefill on one worker, decode on another: where the two SGLangs meet.

SGLang's prefill and decode run at the same time and find each other in a *room*, a number on the prefill side's
bootstrap server.  So a hand-over is told as soon as its room is open, before anything is computed.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import msgpack

from p2pdyn.engines.hosted import Unreadable

MAX_PARAMS = 1024
"""Bytes: an address and a number."""
FAKE_HOST = "2.2.2.2"
"""SGLang's own name for a partner that is not there: nothing is transferred. To warm up with."""


@dataclass(frozen=True, slots=True)
class Room:
    """``room`` is the request's, unique among those that are open at this server."""

    host: str
    port: int
    room: int

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb({"bootstrap_host": self.host, "bootstrap_port": self.port, "room": self.room})
        return packed

    def arguments(self) -> dict[str, Any]:
        """Of async_generate, on either side."""
        return {"bootstrap_host": self.host, "bootstrap_port": self.port, "bootstrap_room": self.room}


def opened(host: str, port: int) -> Room:
    """A new one. At random, so that rooms of a server's earlier life are not met again."""
    return Room(host, port, secrets.randbits(63))


def unpack(packed: bytes) -> Room:
    """What :meth:`Room.pack` made. Raises Unreadable with a sentence for anything else."""
    try:
        if len(packed) > MAX_PARAMS:
            raise ValueError
        params = msgpack.unpackb(packed)
        host, port, room = params["bootstrap_host"], params["bootstrap_port"], params["room"]
        if not (isinstance(host, str) and host and 0 < port < 65536 and 0 <= room < 2**63):
            raise ValueError
    except Exception as error:  # msgpack raises several unrelated classes
        raise Unreadable("what the prefill worker said of its room cannot be read") from error
    return Room(host, port, room)
