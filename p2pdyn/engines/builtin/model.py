"""The Llama architecture on numpy, over a paged KV cache.

Every operation treats a row (one position of one sequence) alike, whatever else is in the batch: linear layers by
:mod:`p2pdyn.engines.builtin.tiles`, attention page by page with the pages' parts added in order.  So the logits of a
position are the same bits whether it is computed by prefill in any chunks, by decoding, or again on another worker with
the same processor and BLAS.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pdyn.engines.builtin.tiles import F32, Linear, Threads
from p2pdyn.engines.memory import allocate

MAX_PART = 1 << 16
"""Floats of attention output that are added up at a time, so that they stay in cache."""


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """``hidden`` is the feed-forward width. The model reads ids below ``vocab`` and writes ids below ``outputs``, which
    are the same but for the tiny model. ``tied``: the head is the embedding."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    outputs: int
    context: int
    norm_eps: float
    rope_theta: float
    tied: bool


@dataclass(slots=True)
class Rows:
    """Some positions of one sequence to compute: ``tokens`` stand at ``start`` and on, all positions before are in
    ``blocks``, which have room for these too. ``logits``: those of the last position are wanted."""

    tokens: array[int]
    start: int
    blocks: list[int]
    logits: bool


class Llama:
    """``tensors`` as :func:`p2pdyn.engines.builtin.checkpoint.pack` makes them; read only, so a mapped file serves.

    ``memory`` begins with one float32 array ``[blocks, layers, 2, kv_heads * head_dim * block_size]``: a block is one
    contiguous byte range.  Keys are stored ``[kv_heads, head_dim, block_size]``, values ``[kv_heads, block_size,
    head_dim]``, the forms that the two products of attention read.  ``kv_memory`` is the file to keep it in, or -1.
    """

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Mapping[str, F32],
        blocks: int,
        block_size: int,
        threads: Threads,
        kv_memory: int = -1,
    ) -> None:
        self.config = config
        self.block_size = block_size
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim

        def linear(name: str, outputs: int) -> Linear:
            return Linear(tensors[name], outputs, threads)

        self._layers = [
            _Layer(
                tensors[f"{i}.attn_norm"],
                linear(f"{i}.qkv", (heads + 2 * kv_heads) * head_dim),
                linear(f"{i}.out", config.dim),
                tensors[f"{i}.ffn_norm"],
                linear(f"{i}.gate_up", 2 * config.hidden),
                linear(f"{i}.down", config.dim),
            )
            for i in range(config.layers)
        ]
        self._head = linear("head", config.outputs)
        self._embedding = None if config.tied else tensors["embedding"]
        self._norm = tensors["norm"]
        self._cos, self._sin = _rotations(config, tensors.get("rope_factors"))
        shape = (blocks, config.layers, 2, kv_heads * head_dim * block_size)
        self.block_bytes = 4 * math.prod(shape[1:])
        self.memory = allocate(blocks, self.block_bytes, kv_memory)
        self.kv = np.frombuffer(self.memory, np.float32, math.prod(shape)).reshape(shape)
        self._keys = self.kv[:, :, 0].reshape(blocks, config.layers, kv_heads, head_dim, block_size)
        self._values = self.kv[:, :, 1].reshape(blocks, config.layers, kv_heads, block_size, head_dim)

    def block(self, index: int) -> memoryview:
        """The bytes of one KV block, writable: what a transfer reads or fills."""
        return memoryview(self.kv[index]).cast("B")

    def forward(self, batch: Sequence[Rows]) -> F32:
        """Compute all rows, write their keys and values into their blocks, and give ``[wanted, outputs]`` logits in the
        batch's order. Sequences share no block that is written."""
        config, size = self.config, self.block_size
        tokens = np.concatenate([np.frombuffer(rows.tokens, np.uint32) for rows in batch]).astype(np.int64)
        places = np.concatenate([np.arange(rows.start, rows.start + len(rows.tokens)) for rows in batch])
        parts = [_Part.of(rows, size, config.heads // config.kv_heads) for rows in batch]
        for part, end in zip(parts, np.cumsum([len(rows.tokens) for rows in batch]).tolist(), strict=True):
            part.rows = slice(end - part.count, end)
        target = np.concatenate([part.blocks[places[part.rows] // size] for part in parts])
        offset = places % size
        cos, sin = self._cos[places, None], self._sin[places, None]
        with np.errstate(over="ignore"):  # exp of a very negative gate: the right answer is 0
            x: F32 = self._head.rows(tokens) if self._embedding is None else self._embedding[tokens]
            for index, layer in enumerate(self._layers):
                query = self._project(index, layer, x, cos, sin, target, offset)
                x = x + layer.out(self._attend(index, query, parts))
                x = x + layer.down(_gated(layer.gate_up(_normed(x, layer.ffn_norm, config.norm_eps))))
            wanted = [part.rows.stop - 1 for part, rows in zip(parts, batch, strict=True) if rows.logits]
            if not wanted:
                return np.empty((0, config.outputs), np.float32)
            return self._head(_normed(x[wanted], self._norm, config.norm_eps))

    def _project(
        self,
        index: int,
        layer: _Layer,
        x: F32,
        cos: F32,
        sin: F32,
        target: NDArray[np.int64],
        offset: NDArray[np.int64],
    ) -> F32:
        """Store the rows' keys and values; give their scaled queries ``[rows, heads, head_dim]``."""
        config = self.config
        heads, rotated = config.heads, config.heads + config.kv_heads
        qkv = layer.qkv(_normed(x, layer.attn_norm, config.norm_eps)).reshape(len(x), -1, config.head_dim)
        both = _rotate(qkv[:, :rotated], cos, sin)
        self._keys[target, index, :, :, offset] = both[:, heads:]
        self._values[target, index, :, offset] = qkv[:, rotated:]
        return both[:, :heads] * np.float32(config.head_dim**-0.5)

    def _attend(self, index: int, query: F32, parts: list[_Part]) -> F32:
        """``[rows, heads * head_dim]``: each row over all positions of its sequence up to its own."""
        config = self.config
        result = np.empty((len(query), config.heads * config.head_dim), np.float32)
        for part in parts:
            grouped = query[part.rows].reshape(part.count, config.kv_heads, part.group, config.head_dim)
            q = grouped.swapaxes(0, 1).reshape(config.kv_heads, part.count * part.group, config.head_dim)
            if q.shape[1] == 1:  # one row would be another kernel; see tiles
                out = _attention(np.repeat(q, 2, axis=1), self._keys[:, index], self._values[:, index], part)[:, :1]
            else:
                out = _attention(q, self._keys[:, index], self._values[:, index], part)
            out = out.reshape(config.kv_heads, part.count, part.group, config.head_dim).swapaxes(0, 1)
            result[part.rows] = out.reshape(part.count, -1)
        return result


@dataclass(frozen=True, slots=True)
class _Layer:
    attn_norm: F32
    qkv: Linear
    out: Linear
    ffn_norm: F32
    gate_up: Linear
    down: Linear


@dataclass(slots=True)
class _Part:
    """One sequence within a batch. ``pages`` selects its blocks: a slice (no copy) when they are in a row. ``hidden``
    is True ``[last pages, 1, count * group, block_size]`` where a position is later than the row's own."""

    count: int
    group: int
    blocks: NDArray[np.int64]
    pages: slice | NDArray[np.int64]
    hidden: NDArray[np.bool_]
    rows: slice

    @classmethod
    def of(cls, rows: Rows, size: int, group: int) -> _Part:
        count = len(rows.tokens)
        blocks = np.array(rows.blocks[: -(-(rows.start + count) // size)], np.int64)
        first = int(blocks[0])
        in_a_row = bool((blocks == np.arange(first, first + len(blocks))).all())
        page = rows.start // size
        columns = np.arange(page * size, len(blocks) * size).reshape(-1, 1, 1, size)
        own = np.repeat(np.arange(rows.start, rows.start + count), group).reshape(1, 1, -1, 1)
        return cls(
            count, group, blocks, slice(first, first + len(blocks)) if in_a_row else blocks, columns > own, slice(0)
        )


def _attention(query: F32, keys: F32, values: F32, part: _Part) -> F32:
    """Softmax attention of ``query [kv_heads, rows, head_dim]`` over one sequence's pages.

    Maxima do not depend on order; sums run over pages in order, then (denominators) over a page's positions in a fixed
    tree, and what is hidden adds exact zeros: so nothing depends on how far the pages reach past a row.
    """
    scores = np.matmul(query, keys[part.pages])  # [pages, kv_heads, rows, block_size]
    np.copyto(scores[-len(part.hidden) :], np.float32(-np.inf), where=part.hidden)
    top = scores.max(axis=0).max(axis=2)
    scores -= np.repeat(top[:, :, None], scores.shape[3], axis=2)  # repeated: one long inner loop instead of short ones
    np.exp(scores, out=scores)
    total = scores.sum(axis=0).sum(axis=2)
    pages = values[part.pages]
    step = max(1, MAX_PART // query.size)
    result: F32 = np.matmul(scores[:step], pages[:step]).sum(axis=0)
    for start in range(step, len(pages), step):
        for page in np.matmul(scores[start : start + step], pages[start : start + step]):
            result += page
    result /= total[:, :, None]
    return result


def _normed(x: F32, weight: F32, eps: float) -> F32:
    """RMSNorm (arXiv:1910.07467)."""
    root: F32 = np.sqrt(np.mean(x * x, axis=1, keepdims=True, dtype=np.float32) + np.float32(eps))
    result: F32 = x / root * weight
    return result


def _gated(gate_up: F32) -> F32:
    """SwiGLU (arXiv:2002.05202): ``silu(gate) * up`` of the two halves."""
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half], gate_up[:, half:]
    squashed: F32 = np.exp(-gate) + np.float32(1)
    return gate / squashed * up


def _rotations(config: LlamaConfig, factors: F32 | None) -> tuple[F32, F32]:
    """Cosines and sines ``[context, head_dim / 2]`` of rotary embedding (arXiv:2104.09864)."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if factors is not None:
        frequencies = frequencies / factors
    angles = np.arange(config.context)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate ``[rows, heads, head_dim]``; a pair is (i, i + head_dim / 2)."""
    half = x.shape[2] // 2
    low, high = x[:, :, :half], x[:, :, half:]
    result = np.empty_like(x)
    result[:, :, :half] = low * cos - high * sin
    result[:, :, half:] = high * cos + low * sin
    return result
