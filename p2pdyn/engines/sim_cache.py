"""The bytes of the simulated engine's KV cache; whose they are, :class:`p2pdyn.engines.paged.PagedBlocks` knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xxhash import xxh3_128_digest

from p2pdyn.engines.memory import allocate

UNIT = 16
"""Bytes: a block's stride is a multiple of it."""


class KvPool:
    """``blocks`` blocks of ``stride`` bytes each, in one piece, then their tags; ``file`` as for :func:`allocate`."""

    def __init__(self, blocks: int, stride: int, file: int = -1) -> None:
        self.stride = stride
        self.data = allocate(blocks, stride, file)
        self.tags = self.data[blocks * stride :]
        self.content: Callable[[bytes], bytes] = xxh3_128_digest if stride == UNIT else self._wide
        """What to write into a block: ``stride`` bytes, each of which depends on all of the argument."""

    def view(self, block: int) -> memoryview:
        """The block's bytes, to read and to write."""
        start = block * self.stride
        return self.data[start : start + self.stride]

    def write(self, blocks: Sequence[int], contents: Sequence[bytes]) -> None:
        """Write each block's bytes: one copy for each run of neighbours."""
        data, at = b"".join(contents), 0
        for view in self.spans(blocks):
            view[:] = data[at : at + len(view)]
            at += len(view)

    def _wide(self, digest_of: bytes) -> bytes:
        return b"".join([xxh3_128_digest(digest_of, seed) for seed in range(self.stride // UNIT)])

    def spans(self, blocks: Sequence[int]) -> list[memoryview]:
        """All bytes of ``blocks``, in order: one view for each run of neighbours, so that reading is cheap."""
        stride, data = self.stride, self.data
        views: list[memoryview] = []
        start = end = blocks[0]
        for block in blocks:
            if block != end:
                views.append(data[start * stride : end * stride])
                start = block
            end = block + 1
        views.append(data[start * stride : end * stride])
        return views

    def extend(self, spans: list[memoryview], last: int, block: int) -> None:
        """Add ``block`` behind ``last`` to what :meth:`spans` gave."""
        if block != last + 1:
            spans.append(self.view(block))
        else:
            end = (block + 1) * self.stride
            spans[-1] = self.data[end - self.stride - len(spans[-1]) : end]
