"""What a running node reads again at SIGHUP: cluster key, API keys, TLS certificate.

Each on its own, and whole or not at all: what cannot be used is named in the log, and what was in use stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from p2pdyn.net.curve import Security

if TYPE_CHECKING:
    from p2pdyn.net.mdns import Mdns
    from p2pdyn.net.sockets import Sockets

log = logging.getLogger(__name__)

Part = tuple[str, Callable[[], None]]
"""Its name, and what reads it again or raises OSError or ValueError with a sentence."""


async def reload_when(asked: asyncio.Event, parts: Callable[[], Sequence[Part]]) -> None:
    """Read all parts again each time ``asked`` is set."""
    while True:
        await asked.wait()
        asked.clear()
        found = parts()
        if not found:
            log.info("nothing to read again: this node has neither a cluster key nor an HTTP endpoint")
        for name, read in found:
            try:
                read()
                log.info("%s: read again", name)
            except (OSError, ValueError) as error:
                log.error("%s: not read again, what is in use stays: %s", name, error)


def take_cluster_key(path: Path, sockets: Sockets, mdns: Mdns | None) -> None:
    """Raises ValueError."""
    security = Security.load(path)
    if security == sockets.security:
        return
    sockets.change_keys(security)
    if mdns is not None:
        mdns.announce_key(security.fingerprint)
    log.info("cluster key fingerprints, the serving one first: %s", security.fingerprint)
