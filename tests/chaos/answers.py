"""What a request must be answered: the simulated engine's token at a position is a function of the ids before it, the
sampling parameters and the seed, so each request has one right answer, whoever computes it and however often it moves.

Computed here from p2pdyn's formulas (`engines/sim_text.py`, `engines/sim.py`) over the whole text, with no cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from p2pdyn.engines.sim_args import SimArgs
from p2pdyn.engines.sim_text import Vocabulary, draw, odds
from p2pdyn.text.card import IM_END, IM_START, byte_level

MODEL = "sim"
Message = tuple[str, str]
"""(role, content)."""


@dataclass(frozen=True)
class Question:
    """A chat if ``messages``, else a completion of ``prompt``. ``stop`` is one stop string, or "" for none."""

    max_tokens: int
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    stop: str = ""
    stream: bool = True

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.messages else "/v1/completions"

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": MODEL, "max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.messages:
            body["messages"] = [{"role": role, "content": content} for role, content in self.messages]
        else:
            body["prompt"] = self.prompt
        if self.temperature:
            body["seed"] = self.seed
        if self.stop:
            body["stop"] = self.stop
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def tokens(self) -> list[int]:
        """The prompt's: one a byte, ChatML around messages."""
        if not self.messages:
            return list(self.prompt.encode())
        ids: list[int] = []
        for role, content in self.messages:
            ids += [IM_START, *f"{role}\n{content}".encode(), IM_END, *b"\n"]
        return [*ids, IM_START, *b"assistant\n"]


@dataclass(frozen=True)
class Answer:
    """``text`` without the stop string; ``completion_tokens`` with it."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Blocks:
    """A sequence's KV blocks, as an engine without a prefix cache computes them."""

    size: int
    seed: int
    full: list[bytes] = field(default_factory=list)
    tail: bytes = b""
    held: int = 0
    """Tokens in the last block, whose content is a digest of ``tail``."""

    def __post_init__(self) -> None:
        self.tail = xxh3_128_digest(b"%d 0 " % self.seed)

    def add(self, token: int) -> None:
        if self.held == self.size:
            self.full.append(xxh3_128_digest(self.tail))
            self.tail, self.held = self.full[-1], 0
        self.tail += token.to_bytes(4, "little")
        self.held += 1

    def digest(self) -> int:
        return xxh3_64_intdigest(b"".join(self.full) + xxh3_128_digest(self.tail))


@cache
def _vocabulary() -> Vocabulary:
    return Vocabulary.from_tokenizer(byte_level().tokenizer_json)


def answer_to(question: Question) -> Answer:
    """The only right one, from workers with the default weights."""
    prompt = question.tokens()
    defaults = SimArgs()
    blocks = Blocks(defaults.block_size, defaults.seed)
    for token in prompt:
        blocks.add(token)
    limits, words, said = odds(question.temperature, 0, 1.0, 0.0), _vocabulary(), bytearray()
    stop = question.stop.encode()
    while len(said) < question.max_tokens:
        start = words.first[blocks.digest() % len(words.first)]
        token = words.ring[start + draw(limits, question.seed, len(prompt) + len(said))]
        said.append(token)
        blocks.add(token)
        if stop and said.endswith(stop):
            return Answer(said[: -len(stop)].decode(), "stop", len(prompt), len(said))
    return Answer(said.decode(), "length", len(prompt), len(said))
