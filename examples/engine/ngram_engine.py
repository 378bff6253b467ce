"""An engine in one file: a language model that counts which byte follows which three.

    PYTHONPATH=examples/engine p2pdyn node --engine ngram_engine:create [--model TEXT] [-- --kv-blocks N --context N]

It learns from the paragraphs of a text file (without ``--model`` from this one).  Batching, streaming, aborting, seeds,
the prefix cache and its events are those of a real engine; only the model is small, and its KV blocks hold nothing.
docs/engines.md walks through it.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from p2pdyn.core.types import Load
from p2pdyn.engines.base import (
    BlocksRemoved,
    BlocksStored,
    EngineError,
    EngineInfo,
    EngineOptions,
    EngineUsageError,
    KvEvent,
    Output,
    Progress,
    Sequence,
    Step,
    TransferOrder,
)
from p2pdyn.text.card import byte_level

BLOCK, ORDER, PLACES = 16, 3, 8
"""Tokens a KV block, tokens that the next one depends on, sequences in a batch."""
FEATURES = ("min_tokens", "seed")


def create(options: EngineOptions) -> NgramEngine:
    """What ``--engine ngram_engine:create`` names. Nothing is loaded yet."""
    numbers = {"--kv-blocks": 1024, "--context": 4096}
    words = " ".join(options.args).replace("=", " ").split()
    for flag, value in zip(words[::2], (*words[1::2], ""), strict=False):
        if flag not in numbers or not value.isdecimal() or int(value) < BLOCK:
            raise EngineUsageError(f"{flag} {value} is no argument of ngram: it takes --kv-blocks N and --context N")
        numbers[flag] = int(value)
    return NgramEngine(options, numbers["--kv-blocks"], numbers["--context"])


class NgramEngine:
    """See :class:`p2pdyn.engines.base.Engine`."""

    def __init__(self, options: EngineOptions, kv_blocks: int, context: int) -> None:
        self._options = options
        self._kv_blocks = kv_blocks
        self._context = min(context, kv_blocks * BLOCK)
        self._counts: dict[bytes, Counter[int]] = defaultdict(Counter)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._instant: list[Output] = []  # ends of sequences that never run
        self._cache: OrderedDict[int, None] = OrderedDict()  # blocks by hash, least recently used first
        self._events: list[KvEvent] = []

    # ---- loading

    def load(self, progress: Progress) -> EngineInfo:
        """Blocks: it runs in the host child, not in the peer."""
        path = Path(self._options.model or __file__)
        progress(0.0, f"counting {path.name}")
        try:
            text = path.read_bytes()
        except OSError as error:
            raise EngineError(f"{path} cannot be read ({error.strerror}): name a text file with --model") from error
        card = byte_level(FEATURES, self._context)
        self._end = card.eos_token_ids[-1]
        for paragraph in map(bytes.strip, text.split(b"\n\n")):
            for at, symbol in enumerate([*paragraph, self._end]):
                for begin in range(max(0, at - ORDER), at + 1):
                    self._counts[paragraph[begin:at]][symbol] += 1
        progress(1.0, "ready")
        name = self._options.served_name or path.stem
        weights = blake2b(text, digest_size=16).hexdigest()  # whoever counts the same text computes the same
        return EngineInfo(
            "ngram", "1", name, card.pack(), BLOCK, self._kv_blocks, PLACES, self._context, FEATURES, weights
        )

    # ---- work

    def submit(self, sequence: Sequence, now: float) -> None:
        length, wanted = sequence.prompt_len, sequence.params.max_tokens
        if not length:
            self._instant.append(Output(sequence.key, (), "invalid", detail="the prompt is empty"))
        elif length >= self._context:
            detail = f"the prompt has {length} tokens, but the context is {self._context}: shorten it"
            self._instant.append(Output(sequence.key, (), "invalid", detail=detail))
        elif len(sequence.tokens) >= length + wanted:  # an earlier attempt has produced all of it
            self._instant.append(Output(sequence.key, (), "length"))
        else:
            self._waiting.append(sequence)

    def abort(self, key: int, now: float) -> None:
        self._running.pop(key, None)
        self._waiting = deque(one for one in self._waiting if one.key != key)
        self._instant = [output for output in self._instant if output.key != key]

    def transfer(self, order: TransferOrder, now: float) -> None:
        """None comes to an engine that shows no KV memory."""

    def next_step(self, now: float) -> float | None:
        return now if self._instant or self._running or self._waiting else None

    def step(self, now: float) -> Step:
        """One token for each running sequence, after those that wait have taken the free places."""
        outputs, self._instant = self._instant, []
        cached = {}
        while self._waiting and len(self._running) < PLACES:
            sequence = self._waiting.popleft()
            self._running[sequence.key] = sequence
            cached[sequence.key] = self._keep(sequence)
        for key, sequence in list(self._running.items()):
            token = self._choose(sequence)
            sequence.tokens.append(token)
            if len(sequence.tokens) % BLOCK == 0:
                self._keep(sequence)
            finish = self._finish(sequence, token)
            if finish:
                del self._running[key]
            outputs.append(Output(key, (token,), finish, cached.get(key, 0)))
        events, self._events = self._events, []
        return Step(outputs, events)

    def load_report(self) -> Load:
        used = sum(-(-len(sequence.tokens) // BLOCK) for sequence in self._running.values())
        return Load(len(self._running), used, len(self._waiting), used, self._kv_blocks)

    def close(self) -> None:
        """Nothing to free; the process ends."""

    # ---- the model

    def _choose(self, sequence: Sequence) -> int:
        """The next token, a function of the tokens before it, the parameters and the seed alone: another worker that is
        given prompt and output so far goes on identically."""
        params, made = sequence.params, len(sequence.tokens) - sequence.prompt_len
        recent = bytes(min(token, 255) for token in sequence.tokens[-ORDER:])
        held_back = {self._end, *params.stop_token_ids} if made < params.min_tokens else set()
        tails = (self._counts.get(recent[at:], Counter()) for at in range(len(recent) + 1))  # the longest first
        choices = next(found for tail in tails if (found := {t: n for t, n in tail.items() if t not in held_back}))
        ranked = sorted(choices, key=lambda token: (-choices[token], token))
        if not params.temperature:
            return ranked[0]
        weights = [choices[token] ** (1 / params.temperature) for token in ranked]
        total = most = sum(weights)
        for kept, weight in enumerate(reversed(weights)):  # top_p: without the unlikeliest that are too many
            if (most - weight) / total < params.top_p:
                ranked, weights = ranked[: len(ranked) - kept], weights[: len(weights) - kept]
                break
            most -= weight
        return random.Random(f"{params.seed} {made}").choices(ranked, weights)[0]

    def _finish(self, sequence: Sequence, token: int) -> str:
        params = sequence.params
        if token in params.stop_token_ids or (token == self._end and not params.ignore_eos):
            return "stop"
        room = min(sequence.prompt_len + params.max_tokens, self._context) - len(sequence.tokens)
        return "" if room > 0 else "length"

    # ---- the prefix cache

    def _keep(self, sequence: Sequence) -> int:
        """Cache all full blocks of a sequence; how many of its tokens were there. The last token is always computed."""
        blocks = list(self._blocks(sequence))
        known = next((at for at, (block, _) in enumerate(blocks) if block not in self._cache), len(blocks))
        if known < len(blocks):
            parent = blocks[known - 1][0] if known else None
            tokens = tuple(token for _, part in blocks[known:] for token in part)
            stored = tuple(block for block, _ in blocks[known:])
            self._events.append(BlocksStored(stored, parent, tokens, sequence.params.cache_salt))
        for block, _ in reversed(blocks):  # a parent is used after its children, so that it leaves after them
            self._cache[block] = None
            self._cache.move_to_end(block)
        gone = tuple(islice(self._cache, max(0, len(self._cache) - self._kv_blocks)))
        if gone:
            self._events.append(BlocksRemoved(gone))
        for block in gone:
            del self._cache[block]
        return min(known, (len(sequence.tokens) - 1) // BLOCK) * BLOCK

    def _blocks(self, sequence: Sequence) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(hash, tokens) of each full block; a hash names the salt and all tokens up to the block's end."""
        digest = blake2b(sequence.params.cache_salt.encode(), digest_size=8)
        for at in range(0, len(sequence.tokens) - BLOCK + 1, BLOCK):
            part = sequence.tokens[at : at + BLOCK]
            digest.update(part.tobytes())
            yield int.from_bytes(digest.digest()), tuple(part)
