"""From logits to the next token.

Order, as vLLM's: penalties, min_tokens, temperature, min_p, top_k, top_p.  Randomness is a function of (seed, number of
the output token), so that a sequence that moves to another worker draws on from the same stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.builtin.tiles import F32

F64 = NDArray[np.float64]
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as vLLM's."""

Row = tuple[float, tuple[tuple[int, float], ...]]
"""(logprob of the chosen token, ((token id, logprob), ...)), likeliest first."""


def choose(
    logits: F32, tokens: array[int], prompt_len: int, params: SamplingParams, stops: Sequence[int], seed: int
) -> int:
    """The token that follows ``tokens``; ``stops`` are impossible until min_tokens are out."""
    position = len(tokens) - prompt_len
    values = _penalised(logits, tokens, prompt_len, params)
    if position < params.min_tokens and stops:
        values = values.copy()
        values[list(stops)] = -np.inf
    if params.temperature < GREEDY_BELOW:
        return int(values.argmax())
    return _draw(values, params, uniform(seed, position))


def uniform(seed: int, position: int) -> float:
    """In [0, 1): 53 bits of BLAKE2b over both numbers."""
    data = (seed & (2**64 - 1)).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 11) / 2**53


def _penalised(logits: F32, tokens: array[int], prompt_len: int, params: SamplingParams) -> F32:
    """Repetition (arXiv:1909.05858) over all tokens, presence and frequency over the output."""
    if params.repetition_penalty == 1 and not params.presence_penalty and not params.frequency_penalty:
        return logits
    values = logits.copy()
    ids = np.frombuffer(tokens, np.uint32)
    if params.repetition_penalty != 1:
        seen = np.unique(ids)
        old = values[seen]
        values[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    out, counts = np.unique(ids[prompt_len:], return_counts=True)
    values[out] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    return values


def _draw(values: F32, params: SamplingParams, where: float) -> int:
    """Inverse of the distribution function, in id order."""
    scaled = values.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    if params.min_p > 0:
        weights[weights < params.min_p] = 0  # the likeliest token weighs 1
    if 0 < params.top_k < len(weights):
        weights[weights < np.partition(weights, -params.top_k)[-params.top_k]] = 0
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[1:][before[1:] >= params.top_p * weights.sum()]] = 0
    summed = np.cumsum(weights)
    chosen = int(np.searchsorted(summed, where * summed[-1], side="right"))
    return min(chosen, int(np.flatnonzero(weights)[-1]))


def logprobs(logits: F32, chosen: int, alternatives: int) -> Row:
    """Of the model's own distribution, before temperature and penalties."""
    values = logits.astype(np.float64)
    top = values.max()
    values -= top + np.log(np.exp(values - top).sum())
    likeliest: list[int] = []
    if alternatives:
        count = min(alternatives, len(values))
        few = np.sort(np.argpartition(-values, count - 1)[:count])
        likeliest = few[np.argsort(-values[few], kind="stable")].tolist()
    return float(values[chosen]), tuple((token, float(values[token])) for token in likeliest)
