"""Model cards from workers, each fetched once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from p2pdyn.net.worker_link import WorkerLink
from p2pdyn.text.card import ModelCard

log = logging.getLogger(__name__)

CARD_S = 20.0
"""Longest that a first request for a model waits for its card."""

MAX_CARDS = 64
"""Kept, some MB each; the oldest is fetched again when it is wanted."""


class Cards:
    """By digest. ``links(model)`` are the links to the model's workers that are up now."""

    def __init__(self, links: Callable[[str], Iterable[WorkerLink]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._links = links
        self._known: dict[str, ModelCard] = {}
        self._fetching: dict[str, asyncio.Task[ModelCard]] = {}

    def known(self, digest: str) -> ModelCard | None:
        return self._known.get(digest)

    async def get(self, model: str, digest: str) -> ModelCard:
        """The card, fetched if need be. Raises TimeoutError, LookupError, ConnectionError or ValueError."""
        card = self._known.get(digest)
        if card is not None:
            return card
        task = self._fetching.get(digest)
        if task is None:
            task = self._fetching[digest] = self._loop.create_task(self._fetch(model, digest))
            task.add_done_callback(lambda done: self._done(digest, done))
        return await asyncio.wait_for(asyncio.shield(task), CARD_S)

    def close(self) -> None:
        for task in self._fetching.values():
            task.cancel()

    async def _fetch(self, model: str, digest: str) -> ModelCard:
        """From any worker whose link is up, one after the other, until one gives it."""
        last: Exception = LookupError(f"no worker of {model!r} is linked")
        deadline = self._loop.time() + CARD_S
        while self._loop.time() < deadline:
            for link in self._links(model):
                try:
                    packed = await link.fetch("card", digest)
                    card = ModelCard.unpack(packed)
                    if card.digest != digest:
                        raise LookupError(f"worker {link.worker} sent another card than {digest}")
                    return card
                except (LookupError, ConnectionError, TimeoutError, ValueError) as error:
                    log.warning("model card %s from worker %s: %s", digest, link.worker, error)
                    last = error
            await asyncio.sleep(0.05)
        raise last

    def _done(self, digest: str, task: asyncio.Task[ModelCard]) -> None:
        self._fetching.pop(digest, None)
        if not task.cancelled() and task.exception() is None:
            if len(self._known) >= MAX_CARDS:
                del self._known[next(iter(self._known))]
            self._known[digest] = task.result()
