"""The owner's side of the tcp mover: a ROUTER that answers each Ask with the bytes it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from p2pdyn.constants import TRANSFER_MAX
from p2pdyn.core.types import Address
from p2pdyn.net.sockets import Sockets
from p2pdyn.transfer.base import Region
from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.schema import TRANSFER
from p2pdyn.wire.shape import WireError
from p2pdyn.wire.transfer import PART, Ask, Part, Probe, Refusal, Span, unpack_spans

HIGH_WATER = 64
"""Messages queued a connection: 16 MB for a reader that asks and does not read. Ours asks for 8 parts at a time."""

_ZEROS = memoryview(bytes(PART))


class Owner:
    """Lives from construction to :meth:`close`. Raises OSError or PermissionError with a sentence."""

    def __init__(
        self,
        sockets: Sockets,
        address: Address,
        regions: Sequence[Region],
        life: int,
        held: Callable[[int], bool],
    ) -> None:
        self._regions = regions
        self._life = life
        self._held = held
        self._link = sockets.router([address], self._receive, max_size=TRANSFER_MAX, high_water=HIGH_WATER)
        self.address = self._link.addresses[0]
        self.bytes_served = 0
        self.refused = 0
        self.malformed = 0
        """Messages that were dropped."""

    def close(self) -> None:
        self._link.close()

    def _receive(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise WireError("not one frame")
            message = decode(TRANSFER, frames[1])
            if not isinstance(message, Ask | Probe):
                raise WireError("not for an owner")
        except WireError:
            self.malformed += 1
            return
        number = message.number
        try:
            if message.life != self._life:
                raise LookupError("it was restarted, and its blocks are others")
            data = _ZEROS[: message.size] if isinstance(message, Probe) else self._bytes(message)
        except LookupError as error:
            self.refused += 1
            self._link.send([frames[0], encode(Refusal(number, str(error)))])
            return
        if self._link.send([frames[0], encode(Part(number)), data]):
            self.bytes_served += len(data)

    def _bytes(self, ask: Ask) -> memoryview | bytes:
        """Raises LookupError with the reason to refuse."""
        spans = unpack_spans(ask.spans)
        if not spans or sum([span.size for span in spans]) > PART:
            raise LookupError("no bytes, or more than fit into a part, were asked for")
        views = [self._view(span) for span in spans]
        return views[0] if len(views) == 1 else b"".join(views)

    def _view(self, span: Span) -> memoryview:
        region, start, size = span
        if region >= len(self._regions) or not size or start + size > len(self._regions[region].memory):
            raise LookupError("what was asked for does not exist")
        memory, stride = self._regions[region]
        held = self._held
        for block in range(start // stride, (start + size - 1) // stride + 1):
            if not held(block):
                raise LookupError("a block is not held for anybody")
        return memory[start : start + size]
