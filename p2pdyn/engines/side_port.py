"""A port that an engine binds by itself, much later than we choose it."""

from __future__ import annotations

import socket
from contextlib import suppress
from secrets import randbelow

from p2pdyn.engines.base import EngineError, EngineUsageError

SIDE_PORTS = range(20_000, 30_000)
"""Where free ones are looked for: below those that Linux gives to outgoing connections."""


def choose(host: str, wanted: int, count: int, whose: str) -> int:
    """The first of ``count`` ports on ``host``: ``wanted``, or some that are free if that is 0. Raises
    EngineUsageError where one is taken, which engines wait for for ever; ``whose`` begins the sentence."""
    first = wanted or _free(host, count, whose)
    for port in range(first, first + count):
        try:
            _bound(host, port).close()
        except OSError as error:
            raise EngineUsageError(
                f"{whose} cannot use {host}:{port} ({error.strerror}): free the port or choose another"
            ) from error
    return first


def _free(host: str, count: int, whose: str) -> int:
    for _ in range(100):
        first = SIDE_PORTS.start + randbelow(len(SIDE_PORTS) - count)
        with suppress(OSError):
            for port in range(first, first + count):
                _bound(host, port).close()
            return first
    where = f"{SIDE_PORTS.start} to {SIDE_PORTS.stop - 1}"
    raise EngineError(f"{whose} finds no free port from {where}: give the node a --port")


def _bound(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock
