"""What the simulated engine says: from a hash to a token.

The vocabulary is ordinary printable tokens only, so the text reads like words and never ends by itself.  A sequence's
hash picks the likeliest token; the next likeliest are its successors on the ring, and the logits fall by the same
amount from rank to rank.  So there is a true distribution, equal for every worker, for temperature, top_k, top_p,
min_p, penalties and logprobs to act on.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from xxhash import xxh3_64_intdigest

from p2pdyn.core.types import SamplingParams

RANKS = 20
"""Tokens with a probability above 0 at each position: as many as OpenAI's top_logprobs can ask for."""
TOP_LOGIT = 4.0
FALL = 0.5
"""Logit of the likeliest token, and its distance from rank to rank: the likeliest has 39 % at temperature 1."""
MAX_WORDS = 4096
MIN_WORDS = 256

_LETTERS = "ĠĠĠĠĠĠĠĠĠeeeeeettttaaaaooooiiinnnsshhrrddlluucmfywgpbvkxjqz"
"""About English, in a byte-level vocabulary's spelling: one character in six is a space."""
_ALPHABET = frozenset(_LETTERS)

_LOGITS = tuple(TOP_LOGIT - FALL * rank for rank in range(RANKS))
_WORD = re.compile("[Ġ▁][A-Za-z]{2,}")
_BARE = re.compile("[a-z]+")

Row = tuple[float, tuple[tuple[int, float], ...]]
"""(logprob of the chosen token, ((token id, logprob), ...))."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """``ring[first[h % len(first)] + rank]`` is the token of hash ``h`` at ``rank``."""

    ring: tuple[int, ...]
    first: Sequence[int]

    @classmethod
    def of(cls, tokens: Sequence[int], first: Sequence[int] | None = None) -> Vocabulary:
        """From at least :data:`RANKS` distinct ids; ``first`` (indices into them) weighs them, default evenly."""
        if len(tokens) < RANKS:
            raise ValueError(f"the tokenizer has {len(tokens)} ordinary words; sim needs {RANKS}")
        return cls((*tokens, *tokens[: RANKS - 1]), range(len(tokens)) if first is None else first)

    @classmethod
    def from_tokenizer(cls, tokenizer_json: bytes) -> Vocabulary:
        """The common words of a Hugging Face tokenizer.json, or its letters if that is all it has.

        Raises ValueError if it has too few of both.
        """
        ids = _pieces(tokenizer_json.decode())
        words = sorted(index for piece, index in ids.items() if _WORD.fullmatch(piece))
        if len(words) >= MIN_WORDS:
            return cls.of(words[:MAX_WORDS])
        if _ALPHABET.issubset(ids):
            letters = sorted(ids[piece] for piece in _ALPHABET)
            return cls.of(letters, tuple(letters.index(ids[piece]) for piece in _LETTERS))
        return cls.of(sorted(index for piece, index in ids.items() if _BARE.fullmatch(piece))[:MAX_WORDS])


def _pieces(text: str) -> dict[str, int]:
    """Piece to id. Only the vocabulary is decoded, not the merges, which are most of the file."""
    start = text.find('"vocab"', max(0, text.find('"model"')))
    start = text.find(":", start) + 1 if start >= 0 else len(text)
    try:
        while text[start : start + 1].isspace():
            start += 1
        vocabulary: Any = json.JSONDecoder().raw_decode(text, start)[0]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
        return {str(piece): int(index) for piece, index in pairs}
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError("tokenizer.json has no vocabulary") from error


@lru_cache(maxsize=1024)
def odds(temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[int, ...]:
    """Where a uniform u64 leaves each rank that remains for the next; () at temperature 0: there is only rank 0."""
    return _odds(_LOGITS, temperature, top_k, top_p, min_p)


def _odds(logits: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[int, ...]:
    """As :func:`odds`, for logits in falling order."""
    if temperature <= 0:
        return ()
    weights = [math.exp((logit - logits[0]) / temperature) for logit in logits]
    if top_k > 0:
        del weights[top_k:]
    total = sum(weights)
    keep, reached = 0, 0.0
    for weight in weights:
        if keep and (reached >= top_p * total or weight < min_p):
            break
        reached += weight
        keep += 1
    return tuple(int(until / reached * 2.0**64) for until in accumulate(weights[: keep - 1]))


def draw(odds: tuple[int, ...], seed: int, position: int) -> int:
    """A rank by its odds: a function of (seed, position) alone, so that another worker draws the same."""
    return bisect(odds, xxh3_64_intdigest(position.to_bytes(8, "little"), seed))


class Careful:
    """Chooses for a sequence that asks for more than plain sampling: penalties, min_tokens with stop tokens,
    logprobs.  ``tokens[:prompt_len]`` is the prompt."""

    __slots__ = ("_counts", "_params", "_seen", "_stop", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, params: SamplingParams, tokens: Sequence[int], prompt_len: int) -> None:
        self._vocabulary = vocabulary
        self._params = params
        self._stop = frozenset(params.stop_token_ids)
        self._counts = Counter(tokens[prompt_len:])
        self._seen = set(tokens) if params.repetition_penalty != 1.0 else set()

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        return (
            params.logprobs is not None
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
            or params.repetition_penalty != 1.0
            or (params.min_tokens > 0 and bool(params.stop_token_ids))
        )

    def choose(self, digest: int, seed: int, position: int, generated: int) -> tuple[int, tuple[Row, ...]]:
        """The token at ``position`` and its logprobs row (none unless asked for); ``generated`` tokens came before."""
        params, ring = self._params, self._vocabulary.ring
        start = self._vocabulary.first[digest % len(self._vocabulary.first)]
        logits = {
            token: self._penalised(token, logit)
            for token, logit in zip(ring[start : start + RANKS], _LOGITS, strict=True)
        }
        if generated < params.min_tokens and not self._stop.issuperset(logits):
            logits = {token: logit for token, logit in logits.items() if token not in self._stop}
        ranked = sorted(logits.items(), key=lambda item: -item[1])
        falling = [logit for _, logit in ranked]
        rank = draw(_odds(falling, params.temperature, params.top_k, params.top_p, params.min_p), seed, position)
        token = ranked[rank][0]
        self._counts[token] += 1
        if params.repetition_penalty != 1.0:
            self._seen.add(token)
        if params.logprobs is None:
            return token, ()
        norm = falling[0] + math.log(sum(math.exp(logit - falling[0]) for logit in falling))
        others = tuple((other, logit - norm) for other, logit in ranked[: params.logprobs])
        return token, ((falling[rank] - norm, others),)

    def _penalised(self, token: int, logit: float) -> float:
        params = self._params
        if token in self._seen:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        count = self._counts[token]
        return logit - params.frequency_penalty * count - (params.presence_penalty if count else 0.0)
