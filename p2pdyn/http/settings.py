"""What the HTTP endpoint is told, and the limits it keeps against slow, large and many clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from p2pdyn.constants import SLOW_READER_BYTES, SLOW_READER_S
from p2pdyn.core.types import Address


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds and bytes; reasons are in docs/design/http.md."""

    connections: int = 4096
    header_bytes: int = 32 * 1024
    header_s: float = 10.0
    body_bytes: int = 32 * 2**20
    body_s: float = 10.0
    body_rate: float = 32 * 1024.0
    idle_s: float = 75.0
    linger_s: float = 2.0
    pipelined: int = 16
    slow_bytes: int = SLOW_READER_BYTES
    slow_s: float = SLOW_READER_S
    read_rate: float = 4 * 1024.0
    send_buffer: int = 256 * 1024
    held_bytes: int = 512 * 2**20
    spare_descriptors: int = 64


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """``address`` port 0 picks a free one. Keys and certificate are files, read at start and by HttpServer.reload."""

    address: Address
    api_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    limits: Limits = field(default_factory=Limits)
