"""KV blocks over the project's own sockets, CURVE and all: where NIXL is missing, or has no direct way to the peer.

Two-sided: the owner's process takes part, so it serves only blocks that are held for somebody, and a read is over as
soon as the reader says so.  A reader keeps WINDOW parts of PART bytes outstanding at each owner, drawn in turn from all
reads there; each part is one turn of either loop at most.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

from p2pdyn.constants import TRANSFER_MAX
from p2pdyn.core.types import Address
from p2pdyn.net.link import Link
from p2pdyn.net.sockets import Sockets
from p2pdyn.transfer.base import (
    MEET_S,
    Done,
    Geometry,
    Rate,
    Region,
    TransferError,
    dump_description,
    load_description,
    new_life,
    runs,
)
from p2pdyn.transfer.tcp_owner import HIGH_WATER, Owner
from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.schema import TRANSFER
from p2pdyn.wire.shape import WireError
from p2pdyn.wire.transfer import MAX_SPANS, PART, Ask, Description, Part, Probe, Refusal, Span, pack_spans

WINDOW = 8
"""Parts outstanding at one owner: 2 MB, a few round trips of a fast network."""
PROBES = 4

Piece = tuple[Span, int]
"""Bytes of the owner, and where in the same region they go here."""


class _Read:
    """One read, cut into parts as they are asked for."""

    __slots__ = ("done", "left", "parts", "size", "ticket")

    def __init__(self, ticket: int, parts: Iterator[list[Piece]], done: Done) -> None:
        self.ticket = ticket
        self.parts = parts
        self.done: Done | None = done
        """None: its end is decided."""
        self.size = self.left = 0
        """Bytes, and those that have not arrived."""


class _Peer:
    """An owner that we read from."""

    def __init__(self, name: str, description: Description) -> None:
        self.name = name
        self.description = description
        self.link: Link | None = None
        self.up = False
        self.turns: deque[_Read] = deque()
        """Reads with parts to ask for."""
        self.outstanding: dict[int, tuple[_Read | asyncio.Future[int], list[Piece], int]] = {}
        """What was asked: for whom, where it goes, its size."""
        self.arrived = asyncio.Event()


class TcpMover:
    """Serves ``regions`` at ``address`` (port 0: any), blocks for which ``held(block)`` is true, and reads into them.

    Raises OSError, PermissionError and TransferError, each with a sentence.
    """

    name = "tcp"

    def __init__(
        self, sockets: Sockets, address: Address, regions: Sequence[Region], held: Callable[[int], bool]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._regions = tuple(regions)
        self.geometry = Geometry.of(regions)
        self._life = new_life()
        self.owner = Owner(sockets, address, self._regions, self._life, held)
        self._peers: dict[str, _Peer] = {}
        self._reads: dict[int, tuple[_Peer | None, _Read]] = {}
        self._numbers = count(1)
        self._rate = Rate()
        self.bytes_read = 0
        self.errors = 0
        self.malformed = 0
        """Messages from owners that were dropped."""

    @property
    def reads(self) -> int:
        return len(self._reads)

    @property
    def bandwidth(self) -> float:
        return self._rate.value

    async def ready(self) -> None:
        """It is."""

    def describe(self) -> bytes:
        blocks, strides = self.geometry
        return dump_description(Description(self.name, self._life, blocks, strides, self.owner.address.port))

    async def meet(self, peer: str, host: str, description: bytes) -> None:
        known = load_description(description, self.name, self.geometry.strides)
        self.forget(peer)
        met = self._peers[peer] = _Peer(peer, known)
        try:
            met.link = self._sockets.dealer(
                Address(host, known.port),
                partial(self._receive, met),
                max_size=TRANSFER_MAX,
                high_water=HIGH_WATER,
                on_up=partial(self._went_up, met),
                on_down=partial(self._went_down, met),
            )
            async with asyncio.timeout(MEET_S):
                await met.arrived.wait()
                await self._probe(met)
        except TimeoutError:
            self._drop(met, "no connection")
            raise TransferError(
                f"its KV blocks cannot be reached at {Address(host, known.port)} within {MEET_S:g} s"
            ) from None
        except ValueError as error:
            self._drop(met, "no connection")
            raise TransferError(str(error)) from None
        except BaseException:
            self._drop(met, "no connection")
            raise

    async def _probe(self, peer: _Peer) -> None:
        """A first trip for the connection's sake, then a few parts at once for their rate."""
        for wanted in ([0], [PART] * PROBES):
            answers: list[asyncio.Future[int]] = []
            if not self._reads:
                self._rate.begin(self._loop.time())
            for size in wanted:
                number, answer = next(self._numbers), self._loop.create_future()
                answers.append(answer)
                peer.outstanding[number] = answer, [], size
                self._send(peer, Probe(number, peer.description.life, size))
            await asyncio.gather(*answers)
        if not self._reads:
            self._rate.add(PART * PROBES, self._loop.time())

    def forget(self, peer: str) -> None:
        known = self._peers.get(peer)
        if known is not None:
            self._drop(known, "the peer is gone")

    def _drop(self, peer: _Peer, why: str) -> None:
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
        if peer.link is not None:
            peer.link.close()
        self._lose(peer, why)

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], done: Done) -> int:
        known, ticket = self._peers.get(peer), next(self._numbers)
        read = _Read(ticket, iter(()), done)
        if not self._reads:
            self._rate.begin(self._loop.time())
        self._reads[ticket] = known, read
        trouble = self.geometry.trouble(remote, local, known.description.blocks) if known else "the peer is not known"
        if known is None or trouble or not known.up:
            self._end(read, trouble or "the connection to the peer is down")
            return ticket
        read.parts = _parts(self.geometry.strides, runs(remote, local))
        read.size = read.left = len(remote) * sum(self.geometry.strides)
        known.turns.append(read)
        self._ask(known)
        return ticket

    def cancel(self, ticket: int) -> None:
        entry = self._reads.get(ticket)
        if entry is not None and entry[1].done is not None:
            self._end(entry[1], "it was cancelled", ours=True)

    async def close(self) -> None:
        self.owner.close()
        for peer in list(self._peers.values()):
            self._drop(peer, "the mover is closed")
        if self._reads:  # their ends are on the loop's list
            await asyncio.sleep(0)

    # Asking.

    def _ask(self, peer: _Peer) -> None:
        """Fill the window, one part of each read in turn."""
        turns, outstanding = peer.turns, peer.outstanding
        while turns and len(outstanding) < WINDOW and peer.up:
            read = turns.popleft()
            part = next(read.parts, None) if read.done is not None else None
            if part is None:
                continue
            number, size = next(self._numbers), sum([span.size for span, _ in part])
            outstanding[number] = read, part, size
            turns.append(read)
            self._send(peer, Ask(number, peer.description.life, pack_spans([span for span, _ in part])))

    def _send(self, peer: _Peer, message: object) -> None:
        if peer.link is None or not peer.link.send([encode(message)]):
            self._lose(peer, "the connection to the peer is down")

    # What comes back.

    def _receive(self, peer: _Peer, frames: list[bytes]) -> None:
        try:
            message: Any = decode(TRANSFER, frames[0])
            if not isinstance(message, Part | Refusal) or len(frames) != 1 + isinstance(message, Part):
                raise WireError("not an answer")
            asked = peer.outstanding[message.number]
            if isinstance(message, Part) and len(frames[1]) != asked[2]:
                raise WireError("not the bytes asked for")
        except (WireError, KeyError):
            self.malformed += 1
            return
        del peer.outstanding[message.number]
        whose, part, size = asked
        if isinstance(whose, asyncio.Future):
            if not whose.done():
                whose.set_result(size) if isinstance(message, Part) else whose.set_exception(_refused(message))
        elif whose.done is not None:
            if isinstance(message, Part):
                self._store(part, frames[1])
                whose.left -= size
                if not whose.left:
                    self._end(whose, "")
            else:
                self._end(whose, str(_refused(message)))
        self._ask(peer)

    def _store(self, part: list[Piece], data: bytes) -> None:
        view, at = memoryview(data), 0
        for (region, _, size), start in part:
            self._regions[region].memory[start : start + size] = view[at : at + size]
            at += size

    def _end(self, read: _Read, why: str, ours: bool = False) -> None:
        """From here on nothing of it is written: parts that still come are dropped."""
        done, read.done = read.done, None
        assert done is not None
        if why:
            self.errors += not ours
        else:
            self.bytes_read += read.size
            self._rate.add(read.size, self._loop.time())
        self._loop.call_soon(self._tell, read.ticket, done, why)

    def _tell(self, ticket: int, done: Done, why: str) -> None:
        del self._reads[ticket]
        done(why)

    # Connections.

    def _went_up(self, peer: _Peer) -> None:
        peer.up = True
        peer.arrived.set()

    def _went_down(self, peer: _Peer, why: str) -> None:
        self._lose(peer, f"the connection to the peer broke: {why}")

    def _lose(self, peer: _Peer, why: str) -> None:
        """Answers will not come any more. The link goes on trying, for reads to come."""
        peer.up = False
        outstanding = list(peer.outstanding.values())
        peer.outstanding.clear()
        peer.turns.clear()
        for whose, _, _ in outstanding:
            if isinstance(whose, asyncio.Future) and not whose.done():
                whose.set_exception(TransferError(why))
        for owner, read in list(self._reads.values()):
            if owner is peer and read.done is not None:
                self._end(read, why)


def _refused(message: Refusal) -> TransferError:
    return TransferError(f"the owner refused: {message.reason}")


def _parts(strides: Sequence[int], blocks: Iterator[tuple[int, int, int]]) -> Iterator[list[Piece]]:
    """Pieces of at most PART bytes and MAX_SPANS spans together."""
    part: list[Piece] = []
    room = PART
    for piece in _pieces(strides, blocks):
        (region, start, size), to = piece
        while size:
            take = min(size, room)
            part.append((Span(region, start, take), to))
            room, start, to, size = room - take, start + take, to + take, size - take
            if not room or len(part) == MAX_SPANS:
                yield part
                part, room = [], PART
    if part:
        yield part


def _pieces(strides: Sequence[int], blocks: Iterator[tuple[int, int, int]]) -> Iterator[Piece]:
    for remote, local, number in blocks:
        for region, stride in enumerate(strides):
            yield Span(region, remote * stride, number * stride), local * stride
