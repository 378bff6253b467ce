"""Introduces peers from a static list: ``--seed HOST:PORT``, repeated, and ``--seeds-file``.

Seeds are never given up: a name is resolved again for ever, since the host behind it may move or come back, and the
file is read again when it changes.  Membership skips the node's own address, so one list serves every host.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from p2pdyn.constants import DEFAULT_PORT
from p2pdyn.core.types import Address

log = logging.getLogger(__name__)

RESOLVE_S = 30.0
"""Between two look-ups of one name that resolves (and two introductions of a literal address), +- 20 %."""

RETRY_MIN_S, RETRY_MAX_S = 0.5, 30.0
"""Back-off while a name does not resolve, doubling, with full jitter above the minimum."""

RESOLVE_TIMEOUT_S = 10.0
FILE_POLL_S = 2.0

MAX_FILE = 1024 * 1024
"""Bytes: a longer seeds file is a mistake."""


def parse_seeds(lines: Iterable[str], source: str) -> tuple[list[Address], list[str]]:
    """(seeds in order, without repetition; one sentence for each bad line). ``#`` starts a comment."""
    seeds: dict[Address, None] = {}
    errors = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            seeds[_seed(text)] = None
        except ValueError as error:
            errors.append(f"{source}, line {number}: {error}")
    return list(seeds), errors


def _seed(text: str) -> Address:
    """A seed; the default port serves a bare host. Port 0 means "any free one" and cannot be called."""
    address = Address.parse(text, DEFAULT_PORT)
    if address.port == 0:
        raise ValueError(f"seed {text!r} has port 0: write the port that the peer listens on")
    return address


class Seeds:
    """Calls ``on_address`` with every address of every seed, again each RESOLVE_S (introductions are idempotent).

    Raises ValueError, with the mend, for a bad seed and for a file that cannot be read or has a bad line.  Later, such
    a file is a warning and its good lines count.
    """

    def __init__(self, seeds: Sequence[str], seeds_file: Path | None, on_address: Callable[[Address], None]) -> None:
        self._named = [_seed(text) for text in seeds]
        self._file = seeds_file
        self._on_address = on_address
        self._stamp: object = None
        self._unresolved: set[Address] = set()
        self._from_file: list[Address] = []
        if seeds_file is not None:
            self._from_file, errors = self._read(seeds_file)
            if errors:
                raise ValueError("; ".join(errors))

    @property
    def seeds(self) -> list[Address]:
        """The seeds as named now, names unresolved."""
        return list(dict.fromkeys([*self._named, *self._from_file]))

    async def run(self) -> None:
        """Until cancelled."""
        followers: dict[Address, asyncio.Task[None]] = {}
        try:
            while True:
                current = self.seeds
                for seed in followers.keys() - set(current):
                    followers.pop(seed).cancel()
                for seed in current:
                    if seed not in followers:
                        followers[seed] = asyncio.create_task(self._follow(seed), name=f"seed {seed}")
                await asyncio.sleep(FILE_POLL_S)
                self._read_again()
        finally:
            for task in followers.values():
                task.cancel()
            await asyncio.gather(*followers.values(), return_exceptions=True)

    async def _follow(self, seed: Address) -> None:
        retry = RETRY_MIN_S
        while True:
            try:
                addresses = await resolve(seed)
            except (OSError, TimeoutError, UnicodeError) as error:
                if seed not in self._unresolved:
                    log.warning("seed %s does not resolve (%s): it is tried again for ever", seed, error)
                self._unresolved.add(seed)
                await asyncio.sleep(random.uniform(RETRY_MIN_S, retry))
                retry = min(2 * retry, RETRY_MAX_S)
                continue
            if seed in self._unresolved:
                self._unresolved.discard(seed)
                log.info("seed %s resolves again", seed)
            retry = RETRY_MIN_S
            for address in addresses:
                self._on_address(address)
            await asyncio.sleep(RESOLVE_S * random.uniform(0.8, 1.2))

    def _read_again(self) -> None:
        if self._file is None or _stamp(self._file) == self._stamp:
            return
        try:
            seeds, errors = self._read(self._file)
        except ValueError as error:
            log.warning("%s; the seeds read before stay", error)
            return
        for why in errors:
            log.warning("%s; the line is left out", why)
        self._from_file = seeds

    def _read(self, path: Path) -> tuple[list[Address], list[str]]:
        self._stamp = _stamp(path)
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_FILE + 1)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise ValueError(f"seeds file {path} cannot be read ({reason}): give a file with HOST:PORT lines") from None
        if len(text) > MAX_FILE:
            raise ValueError(f"seeds file {path} is over {MAX_FILE} bytes: give a file with HOST:PORT lines")
        return parse_seeds(text.splitlines(), str(path))


async def resolve(seed: Address) -> list[Address]:
    """All addresses of a seed, IPv4 and IPv6, in the resolver's order. A literal is itself and asks no resolver."""
    try:
        ipaddress.ip_address(seed.host)
        return [seed]
    except ValueError:
        pass
    loop = asyncio.get_running_loop()
    lookup = loop.getaddrinfo(seed.host, seed.port, type=socket.SOCK_STREAM)
    found = await asyncio.wait_for(lookup, RESOLVE_TIMEOUT_S)
    return list(dict.fromkeys(Address(str(sockaddr[0]), seed.port) for *_, sockaddr in found))


def _stamp(path: Path) -> object:
    """Changes whenever the file does: rewritten in place, replaced by another, or removed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
