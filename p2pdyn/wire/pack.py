"""Unpack msgpack from a peer within bounds."""

from __future__ import annotations

from typing import Any

import msgpack

from p2pdyn.wire.shape import WireError

MAX_ITEMS = 65536
"""Items of any array and entries of any map, whatever the schema."""

_SCAN_FROM = 2048
"""Bytes. msgpack allocates an array as its header claims, before it has seen an item, so that nested headers make
megabytes of a few bytes. Larger messages are scanned first, which allocates nothing and costs a tenth of unpacking."""


def unpack(data: bytes | memoryview, *, maps: bool) -> Any:
    """Unpack exactly one msgpack object: arrays become tuples, sizes stay within the input's. Raises WireError."""
    size = len(data)
    items = min(size, MAX_ITEMS)
    try:
        if size > _SCAN_FROM:
            scanner = msgpack.Unpacker(max_buffer_size=size)
            scanner.feed(data)
            scanner.skip()
            if scanner.tell() != size:
                raise WireError("bytes behind the message")
        return msgpack.unpackb(
            data,
            use_list=False,
            max_array_len=items,
            max_map_len=items if maps else 0,
            max_ext_len=0,
        )
    except WireError:
        raise
    except msgpack.OutOfData:
        raise WireError("truncated") from None
    except msgpack.ExtraData:
        raise WireError("bytes behind the message") from None
    except (ValueError, TypeError, msgpack.BufferFull) as error:
        raise WireError(f"not msgpack as we speak it ({type(error).__name__})") from None
