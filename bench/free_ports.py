"""A port for a server that is told one, and binds it only when it has loaded."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

PORTS = 20000, 30000
"""Below those that the kernel gives out by itself, of which another process may get the same one meanwhile."""


def free_port() -> int:
    """One of loopback that nobody has now."""
    while True:
        port = random.randrange(*PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
