"""What moves the bytes of KV blocks between two peers' processes, and what all movers share.

A mover reads blocks from peers that it has met into this process's memory, and lets them read here.  It knows nothing
of leases: whether what was read may be used, :mod:`p2pdyn.core.pull` decides (docs/design/kv-transfer.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from secrets import randbits
from typing import NamedTuple, Protocol

from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.schema import TRANSFER
from p2pdyn.wire.shape import WireError
from p2pdyn.wire.transfer import Description, Offer

MEET_S = 5.0
"""Seconds to set up a connection and to read over it once."""

Done = Callable[[str], None]
"""Told once, on the loop, when nothing can be written to the local blocks any more: "" or, in a sentence, why not."""


class TransferError(RuntimeError):
    """Blocks cannot be moved; the message is one sentence."""


class Region(NamedTuple):
    """Block i is ``memory[i * stride : (i + 1) * stride]``; writable."""

    memory: memoryview
    stride: int


class Mover(Protocol):
    """Used on one event loop, in its thread. A peer is named ``<node>-<epoch>``."""

    @property
    def name(self) -> str: ...

    @property
    def reads(self) -> int:
        """Under way: ``done`` has not been told."""

    @property
    def bytes_read(self) -> int: ...

    @property
    def errors(self) -> int:
        """Reads that ended with an error that nobody here asked for."""

    @property
    def bandwidth(self) -> float:
        """Bytes a second, smoothed over the last reads; 0: none yet."""

    async def ready(self) -> None:
        """From here on :meth:`describe` does not wait. Raises TransferError if nothing can be read from here."""

    def describe(self) -> bytes:
        """What a peer needs to read from here. Raises TransferError as :meth:`ready`."""

    async def meet(self, peer: str, host: str, description: bytes) -> None:
        """Connect to a peer and read from it once, so that no request pays for that. ``host`` is where it can be
        reached. Raises TransferError; WireError never: the description is checked strictly."""

    def forget(self, peer: str) -> None:
        """It is gone, or is not needed: reads from it end with an error. Unknown ones are ignored."""

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], done: Done) -> int:
        """Read blocks ``remote[i]`` of a peer into ``local[i]``, in all regions. The ticket is for :meth:`cancel`;
        ``done`` is never told before this returns."""

    def cancel(self, ticket: int) -> None:
        """End a read early. ``done`` still comes, once it is over. Unknown tickets are ignored."""

    async def close(self) -> None:
        """Every read is over when this returns. Idempotent."""


class Geometry(NamedTuple):
    """How many blocks there are, and their bytes in each region. Both ends of a read have the same."""

    blocks: int
    strides: tuple[int, ...]

    @classmethod
    def of(cls, regions: Sequence[Region]) -> Geometry:
        """Raises TransferError if the regions do not fit each other."""
        counts = {divmod(len(region.memory), region.stride) for region in regions}
        if len(counts) != 1 or next(iter(counts))[1]:
            raise TransferError("the regions of KV memory do not hold the same whole number of blocks")
        return cls(next(iter(counts))[0], tuple([region.stride for region in regions]))

    def trouble(self, remote: Sequence[int], local: Sequence[int], remote_blocks: int) -> str:
        """Why these blocks cannot be read, or ""."""
        if not remote or len(remote) != len(local):
            return "a read needs as many blocks here as there, and at least one"
        if min(remote) < 0 or max(remote) >= remote_blocks or min(local) < 0 or max(local) >= self.blocks:
            return "a read names blocks that do not exist"
        return ""


def new_life() -> int:
    return randbits(64)


def load_description(data: bytes, mover: str, strides: tuple[int, ...]) -> Description:
    """Of a peer's mover. Raises TransferError if it is none, or its blocks are not like ours."""
    try:
        description = decode(TRANSFER, data)
    except WireError as error:
        raise TransferError(f"its description of KV memory cannot be read: {error.reason}") from None
    if isinstance(description, Offer):
        offered = [found for found in map(_one_of_offer, description.descriptions) if found and found.mover == mover]
        description = offered[0] if offered else None
    if not isinstance(description, Description) or description.mover != mover:
        raise TransferError(f"it offers no KV memory to read over {mover}")
    if description.strides != strides:
        theirs, ours = ("+".join(map(str, sizes)) for sizes in (description.strides, strides))
        raise TransferError(f"its KV blocks have {theirs} bytes, ours {ours}: run the same model and options on both")
    return description


def _one_of_offer(data: bytes) -> Description | None:
    try:
        description = decode(TRANSFER, data)
    except WireError:
        return None
    return description if isinstance(description, Description) else None


def dump_description(description: Description) -> bytes:
    return encode(description)


def runs(remote: Sequence[int], local: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first remote, first local, count) of each run of blocks that are neighbours on both sides."""
    first_remote, first_local, count = remote[0], local[0], 0
    for there, here in zip(remote, local, strict=True):
        if there != first_remote + count or here != first_local + count:
            yield first_remote, first_local, count
            first_remote, first_local, count = there, here, 0
        count += 1
    yield first_remote, first_local, count


class Rate:
    """Bytes a second over the time in which something was under way, smoothed."""

    WHOLE = 64 * 2**20
    """Bytes of a sample that counts for half."""

    def __init__(self) -> None:
        self.value = 0.0
        self._since = 0.0

    def begin(self, now: float) -> None:
        """Something is under way, and nothing was before."""
        self._since = now

    def add(self, size: int, now: float) -> None:
        """``size`` bytes arrived since the last call."""
        took, self._since = now - self._since, now
        if size and took > 0:
            weight = min(0.5, max(0.02, size / self.WHOLE / 2)) if self.value else 1.0
            self.value += weight * (size / took - self.value)
