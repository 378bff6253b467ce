"""Model cards: what a frontend needs of a model to speak text for it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Tokenizer, chat template and generation defaults of one model; data only, never code.

    Workers build and pack it without importing `tokenizers` or `jinja2`; frontends unpack and use it.
    """

    tokenizer_json: bytes
    chat_template: str
    eos_token_ids: tuple[int, ...]
    bos_token: str = ""
    eos_token: str = ""
    context: int = 0
    generation: dict[str, float] = field(default_factory=dict)
