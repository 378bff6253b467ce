"""A slow cable: ``python wire.py PORT PORT MILLISECONDS`` carries each Ethernet frame from one port to the other that
much later, both ways and in order. It works on the raw ports, so connections that are already open become slow too."""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections import deque
from contextlib import suppress

ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR = 263, 15
PACKET_IGNORE_OUTGOING = 23
LARGEST = 1 << 17


def plug(port: str) -> socket.socket:
    """Frames come and go with their virtio header, which holds what is left to do of checksums and segmentation."""
    plugged = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    plugged.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    plugged.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    plugged.bind((port, 0))
    plugged.setblocking(False)
    return plugged


def carry(one: socket.socket, other: socket.socket, delay: float) -> None:
    """For ever."""
    far = {one: other, other: one}
    late: deque[tuple[float, socket.socket, bytes]] = deque()
    with selectors.DefaultSelector() as selector:
        for port in far:
            selector.register(port, selectors.EVENT_READ, port)
        while True:
            wait = max(0.0, late[0][0] - time.monotonic()) if late else None
            for key, _ in selector.select(wait):
                near: socket.socket = key.data
                late.append((time.monotonic() + delay, far[near], near.recv(LARGEST)))
            while late and late[0][0] <= time.monotonic():
                _, to, frame = late.popleft()
                with suppress(OSError):  # a full or unplugged port loses frames, as a cable would
                    to.send(frame)


def main(one: str, other: str, milliseconds: str) -> None:
    """Says when it is ready, and begins when told: until then the frames still go their old way."""
    ports = plug(one), plug(other)
    print("ready", flush=True)
    sys.stdin.readline()
    for port in ports:
        with suppress(BlockingIOError):
            while port.recv(LARGEST):
                pass
    carry(*ports, float(milliseconds) / 1000)


if __name__ == "__main__":
    main(*sys.argv[1:])
