"""Linear layers whose rows do not depend on each other, to the last bit.

A weight matrix is stored transposed and cut into column tiles ``[tiles, inputs, width]``, each contiguous.  A product
multiplies groups of at most :data:`GROUP` rows with one tile after the other: a tile is read from memory once for all
rows and stays in L2 meanwhile.  Every small product has at most :data:`SMALL` multiplications, where OpenBLAS on
AVX-512 takes a kernel that packs nothing and adds each element's products in one order, whatever the number of rows.
So a row's result is the same bits in a batch of one, in a batch of 64 and within a prompt, and a sequence that moves to
another worker continues identically.  One row alone would go to another kernel (gemv): it is padded to two.

docs/design/builtin.md has the measurements: no slower than one large product for prompts, twice as fast for decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

F32: TypeAlias = NDArray[np.float32]

GROUP = 8
"""Rows a product. 8 rows cost a third more than 1; more would leave the small kernel at 1536 inputs."""
SMALL = 1_000_000
"""Multiplications up to which OpenBLAS uses its small-matrix kernels (interface/gemm.c, AVX-512 only)."""
WIDTHS = (64, 32, 16)


def tile_width(inputs: int) -> int:
    """The widest tile whose product with a group stays small."""
    return next((width for width in WIDTHS if width * GROUP * inputs <= SMALL), WIDTHS[-1])


def tile(weight: F32, width: int) -> F32:
    """``[outputs, inputs]`` to ``[tiles, inputs, width]``; outputs are padded with zeros."""
    outputs, inputs = weight.shape
    tiles = -(-outputs // width)
    padded = np.zeros((tiles * width, inputs), np.float32)
    padded[:outputs] = weight
    return np.ascontiguousarray(padded.reshape(tiles, width, inputs).swapaxes(1, 2))


@cache
def least_rows() -> int:
    """The fewest rows that a product may have for its rows to be independent: 2 where the BLAS proves it on an example,
    else :data:`GROUP`, so that all products have one shape."""
    rng = np.random.default_rng(0)
    for inputs in (576, 1536):
        width = tile_width(inputs)
        rows = rng.standard_normal((GROUP, inputs), np.float32)
        weight = rng.standard_normal((inputs, width), np.float32)
        whole = rows @ weight
        for count in range(2, GROUP):
            if not np.array_equal(rows[:count] @ weight, whole[:count]):
                return GROUP
    return 2


class Threads:
    """Splits a product by tiles over threads; with one thread it stays on the caller's.

    The small kernels are single-threaded, so BLAS threads would not help.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1, "builtin") if count > 1 else None

    def run(self, work: Callable[[int, int], None], items: int) -> None:
        """Call ``work(start, stop)`` over all of ``range(items)``."""
        if self._pool is None or items < 2 * self.count:
            work(0, items)
            return
        cuts = [items * i // self.count for i in range(self.count + 1)]
        others = [self._pool.submit(work, cuts[i], cuts[i + 1]) for i in range(1, self.count)]
        work(cuts[0], cuts[1])
        for other in others:
            other.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class Linear:
    """``x [rows, inputs] -> [rows, outputs]`` over tiles ``[tiles, inputs, width]``, which may be read-only memory."""

    def __init__(self, tiles: F32, outputs: int, threads: Threads) -> None:
        self._tiles = tiles[:, None]
        self.outputs = outputs
        self._threads = threads

    def __call__(self, x: F32) -> F32:
        rows, inputs = x.shape
        groups = -(-rows // GROUP)
        each = max(-(-rows // groups), least_rows())
        padded = groups * each
        if padded != rows:
            x = np.concatenate((x, np.zeros((padded - rows, inputs), np.float32)))
        grouped = x.reshape(1, groups, each, inputs)
        tiles, _, _, width = self._tiles.shape
        product = np.empty((tiles, groups, each, width), np.float32)

        def part(start: int, stop: int) -> None:
            np.matmul(grouped, self._tiles[start:stop], out=product[start:stop])

        self._threads.run(part, tiles)
        flat = product.reshape(tiles, padded, width).swapaxes(0, 1).reshape(padded, tiles * width)
        return flat[:rows, : self.outputs]

    def rows(self, indices: NDArray[np.int64]) -> F32:
        """Rows of the original ``[outputs, inputs]`` matrix: the embedding of a model whose head is tied to it."""
        width = self._tiles.shape[3]
        return np.ascontiguousarray(self._tiles[indices // width, 0, :, indices % width])
