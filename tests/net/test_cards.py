"""Model cards are fetched once each, and the number kept is bounded."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import cast

from p2pdyn.net.cards import MAX_CARDS, Cards
from p2pdyn.net.worker_link import WorkerLink
from p2pdyn.text.card import ModelCard


class Shelf:
    """A worker's link, as far as cards go."""

    worker = "a" * 16

    def __init__(self, cards: list[ModelCard]) -> None:
        self.asked: Counter[str] = Counter()
        self._packed = {card.digest: card.pack() for card in cards}

    async def fetch(self, what: str, key: str) -> bytes:
        self.asked[key] += 1
        return self._packed[key]


def test_cards_are_fetched_once_and_the_oldest_make_room() -> None:
    made = [ModelCard(b"{}", "", (), context=number + 1) for number in range(MAX_CARDS + 3)]
    shelf = Shelf(made)

    async def main() -> None:
        cards = Cards(lambda model: [cast(WorkerLink, shelf)])
        for card in made:
            assert await cards.get("m", card.digest) == card
        assert (await cards.get("m", made[-1].digest)).context == len(made)
        assert max(shelf.asked.values()) == 1
        assert sum(cards.known(card.digest) is not None for card in made) == MAX_CARDS
        assert cards.known(made[2].digest) is None
        assert await cards.get("m", made[0].digest) == made[0]
        cards.close()

    asyncio.run(main())
