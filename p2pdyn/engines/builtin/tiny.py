"""A random model of the same architecture: loads in milliseconds, speaks bytes, means nothing. For tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from p2pdyn.engines.builtin.model import LlamaConfig
from p2pdyn.engines.builtin.tiles import F32

TINY = LlamaConfig(
    layers=3,
    dim=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    hidden=128,
    vocab=259,
    outputs=256,
    context=4096,
    norm_eps=1e-5,
    rope_theta=10000.0,
    tied=False,
)
"""The vocabulary is the byte-level card's, 256 bytes and three specials; the specials are never an output."""


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Callable[[str], F32]:
    """Weights by GGUF name, the same in every process: scaled so that activations neither vanish nor explode."""
    names = sorted(shapes)

    def tensor(name: str) -> F32:
        shape = shapes[name]
        rng = np.random.Generator(np.random.PCG64([seed, names.index(name)]))
        values: F32 = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            return np.float32(1) + values / np.float32(8)
        return values * np.float32(0.2 if name.startswith("token_embd") else shape[1] ** -0.5)

    return tensor
