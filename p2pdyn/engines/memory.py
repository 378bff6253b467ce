"""The one range of memory in which an engine keeps its KV blocks, where its peer can read and write them too."""

from __future__ import annotations

import mmap
import os

from p2pdyn.engines.base import EngineError

TAG_BYTES = 32
"""Behind the blocks, so many bytes for each: :mod:`p2pdyn.engines.lending`."""


def allocate(blocks: int, block_bytes: int, file: int = -1) -> memoryview:
    """Zeroes for ``blocks`` blocks and their tags, page-aligned; a page takes memory once it is touched, and all are
    freed with the last view. ``file`` is an empty one to map (a memfd, which the peer maps as well); -1: memory of this
    process alone. Raises EngineError.
    """
    size = blocks * (block_bytes + TAG_BYTES)
    try:
        if file >= 0:
            os.ftruncate(file, size)
        return memoryview(mmap.mmap(file, size))
    except (OSError, ValueError, OverflowError) as error:
        raise EngineError(
            f"no memory for {blocks} KV blocks of {block_bytes} bytes: give fewer with -- --kv-blocks"
        ) from error


def attach(blocks: int, block_bytes: int, file: int) -> memoryview:
    """The same range in another process. Raises OSError or ValueError if ``file`` does not have it."""
    size = blocks * (block_bytes + TAG_BYTES)
    if os.fstat(file).st_size != size:  # to touch what lies behind the end of a file would kill this process
        raise ValueError(f"the engine's shared memory has {os.fstat(file).st_size} bytes instead of {size}")
    return memoryview(mmap.mmap(file, size))
