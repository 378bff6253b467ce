"""Hashes of KV blocks, by which frontends guess which worker holds which prefix (docs/design/kv-hash.md).

A block is ``block_size`` token ids, as little-endian u32.  Its hash is ``h_i = xxh3_64(block, 1337)``; the hash of the
sequence that ends with it is ``s_0 = h_0``, ``s_i = xxh3_64(LE64(s_{i-1}) + LE64(h_i), 1337)``, so one sequence hash
names a whole prefix.  A LoRA or a cache salt gives block 0 another seed (:func:`root_seed`).  They are Dynamo's hashes
where neither is used.  They choose a worker and no more: they are not collision-proof.
"""

from __future__ import annotations

import itertools
import struct
from functools import lru_cache
from itertools import repeat

from xxhash import xxh3_64_intdigest

from p2pdyn.constants import HASH_SEED

_LE32 = struct.Struct("<I")
_PAIR = struct.Struct("<QQ")


def root_seed(lora: str = "", salt: str = "") -> int:
    """The seed of block 0: 1337, or ``xxh3_64(LE32(len(lora)) + lora + salt, 1337)`` over UTF-8 if either is given."""
    if not lora and not salt:
        return HASH_SEED
    name = lora.encode()
    return xxh3_64_intdigest(_LE32.pack(len(name)) + name + salt.encode(), HASH_SEED)


def block_hashes(tokens: bytes, block_size: int, seed: int = HASH_SEED) -> list[int]:
    """The hash of each full block of ``tokens`` (little-endian u32 ids); ``seed`` is block 0's."""
    size = 4 * block_size
    many, one = _cutters(size)
    view = memoryview(tokens)
    whole, head = len(tokens) // size * size, len(tokens) // many.size * many.size
    blocks = itertools.chain.from_iterable((*many.iter_unpack(view[:head]), *one.iter_unpack(view[head:whole])))
    hashes = list(map(xxh3_64_intdigest, blocks, repeat(HASH_SEED)))
    if hashes and seed != HASH_SEED:
        hashes[0] = xxh3_64_intdigest(view[:size], seed)
    return hashes


@lru_cache(maxsize=16)
def _cutters(size: int) -> tuple[struct.Struct, struct.Struct]:
    """What cuts bytes into blocks of ``size``: 64 at a time, in a third of the time of as many slices, and the rest."""
    return struct.Struct(f"{size}s" * 64), struct.Struct(f"{size}s")


def sequence_hashes(tokens: bytes, block_size: int, seed: int = HASH_SEED) -> list[int]:
    """The sequence hash at the end of each full block of ``tokens``."""
    return chain(None, block_hashes(tokens, block_size, seed))


def chain(parent: int | None, hashes: list[int]) -> list[int]:
    """Sequence hashes of consecutive blocks behind the sequence ``parent`` (None: they start one)."""
    if parent is None:
        return [hashes[0], *chain(hashes[0], hashes[1:])] if hashes else []
    pack, digest, last = _PAIR.pack, xxh3_64_intdigest, parent
    return [last := digest(pack(last, block), HASH_SEED) for block in hashes]
