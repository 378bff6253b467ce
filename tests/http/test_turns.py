"""Requests that arrive together share the event loop with the answers to those before them."""

from __future__ import annotations

import asyncio

import pytest

from p2pdyn.http.turns import SLICE_S, Turns


class Work:
    """Each item takes ``cost`` seconds of its own clock; ``rows`` are those answered in each turn of the loop."""

    def __init__(self, cost: float) -> None:
        self.now = 1.0
        self.cost = cost
        self.rows: list[list[int]] = [[]]
        self.turns = Turns(asyncio.get_running_loop(), self.answer, lambda: self.now)

    def answer(self, item: int) -> None:
        self.now += self.cost
        self.rows[-1].append(item)

    async def turn(self) -> None:
        self.rows.append([])
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("cost", "rows"),
    [
        (0.45 * SLICE_S, [[0, 1, 2], [3, 4, 5], [6, 7], [], []]),
        (9 * SLICE_S, [*([item] for item in range(8)), []]),  # longer than a slice: a turn of its own
    ],
)
def test_a_burst_is_answered_in_order_a_slice_in_each_turn(cost: float, rows: list[list[int]]) -> None:
    async def main() -> None:
        work = Work(cost)
        for item in range(8):
            work.turns(item)
        while len(work.rows) < len(rows):
            await work.turn()
        assert work.rows == rows

    asyncio.run(main())


def test_what_arrives_meanwhile_waits_behind_what_waits() -> None:
    async def main() -> None:
        work = Work(SLICE_S * 2)
        work.turns(0)
        work.turns(1)
        await work.turn()
        work.turns(2)
        for _ in range(3):
            await work.turn()
        work.turns(3)
        assert [item for row in work.rows for item in row] == [0, 1, 2, 3]
        assert work.rows[-1] == [3], "what comes alone is answered at once"

    asyncio.run(main())
