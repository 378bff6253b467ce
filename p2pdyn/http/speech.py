"""A model's tokenizer and template, built once from its card."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from p2pdyn.http.backend import Backend
from p2pdyn.http.errors import HttpError
from p2pdyn.text.card import ModelCard
from p2pdyn.text.template import ChatTemplate, TemplateError
from p2pdyn.text.tokenizer import Tokenizer, TokenizerError

BUILD_S = 60.0
MAX_MODELS = 64
"""Models kept built; a vocabulary of 128 k entries takes some 60 MB."""


@dataclass(frozen=True, slots=True)
class Speech:
    """How to speak text with one model. ``template`` is None for a model without one, or with one that is not usable:
    then ``no_chat`` says so. ``plain_ends`` are ids that end a sequence and are ordinary text to the tokenizer."""

    card: ModelCard
    tokenizer: Tokenizer
    plain_ends: frozenset[int]
    template: ChatTemplate | None
    no_chat: str = ""

    @classmethod
    def of(cls, card: ModelCard) -> Speech:
        """Takes up to a second: call it in a thread. Raises TokenizerError."""
        tokenizer = Tokenizer(card.tokenizer_json)
        ends = frozenset(token for token in card.eos_token_ids if not tokenizer.is_special(token))
        if not card.chat_template:
            return cls(card, tokenizer, ends, None, "this model has no chat template: use /v1/completions")
        try:
            return cls(card, tokenizer, ends, ChatTemplate(card.chat_template, card.bos_token, card.eos_token))
        except TemplateError as error:
            return cls(card, tokenizer, ends, None, f"{error}: use /v1/completions")


class Speeches:
    """One Speech a model, built when first asked for and again when the model's card changes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ready: dict[str, Speech] = {}
        self._building: dict[str, tuple[ModelCard, asyncio.Task[Speech]]] = {}

    def ready(self, model: str) -> Speech | None:
        """The model's Speech, if nothing has to be waited for."""
        speech = self._ready.get(model)
        return speech if speech is not None and self._backend.known_card(model) is speech.card else None

    async def of(self, model: str) -> Speech:
        """Raises Rejected as Backend.card does, and HttpError 503 for a card that cannot be used."""
        card = await self._backend.card(model)
        speech = self._ready.get(model)
        if speech is not None and (speech.card is card or speech.card == card):
            return speech
        building = self._building.get(model)
        if building is None or building[0] != card:
            task = asyncio.create_task(asyncio.to_thread(Speech.of, card))
            building = self._building[model] = card, task
            task.add_done_callback(lambda done: self._built(model, done))
        try:
            return await asyncio.wait_for(asyncio.shield(building[1]), BUILD_S)
        except (TokenizerError, TimeoutError) as error:
            message = f"The model card of {model!r} cannot be used: {str(error) or 'it takes too long to load'}."
            raise HttpError(503, message, "unusable_model_card", headers=b"retry-after: 10\r\n") from error

    def _built(self, model: str, task: asyncio.Task[Speech]) -> None:
        current = self._building.get(model)
        if current is None or current[1] is not task:
            return
        del self._building[model]
        if not task.cancelled() and task.exception() is None:
            if len(self._ready) >= MAX_MODELS:
                self._ready.pop(next(iter(self._ready)))
            self._ready[model] = task.result()
