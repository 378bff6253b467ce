"""Which mover carries KV blocks: NIXL where it is there and has a direct way to the peer's memory, else tcp."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec

from p2pdyn.core.types import Address
from p2pdyn.net.sockets import Sockets
from p2pdyn.transfer.base import Done, Mover, Region, TransferError
from p2pdyn.transfer.tcp import TcpMover
from p2pdyn.wire.codec import encode
from p2pdyn.wire.transfer import Offer

log = logging.getLogger(__name__)

INSTALL = "run `pip install --no-deps nixl nixl-cu12` (nixl-cu13 for CUDA 13)"
"""Its other dependency is torch, which moving host memory does not need."""


def means(kind: str) -> tuple[str, ...]:
    """The movers that :func:`choose` makes for ``kind`` on this host, the better one first."""
    if kind == "auto":
        return ("nixl", "tcp") if _has_nixl() else ("tcp",)
    return (kind,)


def choose(
    kind: str,
    sockets: Sockets,
    peer: str,
    address: Address,
    regions: Sequence[Region],
    held: Callable[[int], bool],
) -> Mover:
    """``kind``: auto (both, the better one for each peer), nixl (whatever UCX has to do for it), tcp. ``peer`` is the
    name that others know us by, ``address`` where tcp listens. Raises TransferError."""
    if kind not in ("auto", "nixl", "tcp"):
        raise TransferError(f"KV transfer is {kind}")
    devices = ("lo",) if address.is_loopback else ()
    if kind == "nixl":
        from p2pdyn.transfer.nixl import NixlMover

        if not _has_nixl():
            raise TransferError(f"NIXL is not installed: {INSTALL}, or give --kv-transfer tcp")
        return NixlMover(peer, regions, devices=devices, emulated=True)
    try:
        tcp = TcpMover(sockets, address, regions, held)
    except OSError as error:
        raise TransferError(str(error)) from None
    if kind == "tcp":
        return tcp
    if not _has_nixl():
        log.warning("KV blocks move over tcp, which is slower, because NIXL is not installed: %s", INSTALL)
        return tcp
    from p2pdyn.transfer.nixl import NixlMover

    return Movers([NixlMover(peer, regions, devices=devices), tcp])


def _has_nixl() -> bool:
    return find_spec("nixl") is not None


class Movers:
    """Several movers as one, best first: each peer is read over the first that reaches it."""

    def __init__(self, movers: Sequence[Mover]) -> None:
        self.movers = tuple(movers)
        self._by_peer: dict[str, Mover] = {}
        self._by_ticket: dict[int, tuple[Mover, int]] = {}
        self._tickets = 0
        self._warned = False

    @property
    def name(self) -> str:
        return "+".join([mover.name for mover in self.movers])

    @property
    def reads(self) -> int:
        return len(self._by_ticket)

    @property
    def bytes_read(self) -> int:
        return sum([mover.bytes_read for mover in self.movers])

    @property
    def errors(self) -> int:
        return sum([mover.errors for mover in self.movers])

    @property
    def bandwidth(self) -> float:
        """Of the one that has read most."""
        return max(self.movers, key=lambda mover: (mover.bytes_read, mover.bandwidth)).bandwidth

    async def ready(self) -> None:
        for mover in self.movers:
            with suppress(TransferError):
                await mover.ready()

    def describe(self) -> bytes:
        offered = []
        for mover in self.movers:
            try:
                offered.append(mover.describe())
            except TransferError as error:
                self._warn(f"KV blocks are not given over {mover.name}: {error}")
        return encode(Offer(tuple(offered)))

    async def meet(self, peer: str, host: str, description: bytes) -> None:
        self.forget(peer)
        whys: list[str] = []
        for mover in self.movers:
            try:
                await mover.meet(peer, host, description)
            except TransferError as error:
                whys.append(f"{error} ({mover.name})")
            else:
                self._by_peer[peer] = mover
                if whys:
                    self._warn(f"KV blocks of {peer} are read over {mover.name}: {'; '.join(whys)}")
                return
        raise TransferError("; ".join(whys))

    def _warn(self, what: str) -> None:
        """Once aloud: the same is true of many peers."""
        log.log(logging.INFO if self._warned else logging.WARNING, "%s", what)
        self._warned = True

    def forget(self, peer: str) -> None:
        self._by_peer.pop(peer, None)
        for mover in self.movers:
            mover.forget(peer)

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], done: Done) -> int:
        mover = self._by_peer.get(peer, self.movers[-1])  # the last one will say that it does not know it
        self._tickets += 1
        ticket = self._tickets
        self._by_ticket[ticket] = mover, mover.read(peer, remote, local, partial(self._over, ticket, done))
        return ticket

    def _over(self, ticket: int, done: Done, error: str) -> None:
        del self._by_ticket[ticket]
        done(error)

    def cancel(self, ticket: int) -> None:
        if ticket in self._by_ticket:
            mover, theirs = self._by_ticket[ticket]
            mover.cancel(theirs)

    async def close(self) -> None:
        for mover in self.movers:
            await mover.close()
