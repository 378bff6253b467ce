"""An engine that stands still, dies and starts again; the last module, as it takes the engine of all others with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest
from engines.conformance.bench import Bench, Driven, request, same_tokens

STILL_S = 0.5
"""Longer than any step of a small model; a node waits for 15 s and more before it says `stalled`."""
PROMPT = [97 + (i * i) % 26 for i in range(70)]
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def expected(aggregated: Driven) -> list[int]:
    return aggregated.text(PROMPT, max_tokens=NEW_TOKENS)


def test_one_that_stands_still_is_seen_and_goes_on(bench: Bench, engine: Driven, expected: list[int]) -> None:
    asked = request(PROMPT, max_tokens=NEW_TOKENS)
    engine.freeze()
    try:
        bench.run(asyncio.sleep(0.1), 10)  # what it had told before arrives
        engine.submit(asked)
        since, steps = engine.runner.last_step_s, engine.runner.steps
        turns = count()

        async def still() -> float:
            loop = asyncio.get_running_loop()
            while (quiet := loop.time() - since) < STILL_S:  # the peer's own loop goes on
                next(turns)
                await asyncio.sleep(0.01)
            return quiet

        bench.run(still(), 10)
        assert (engine.runner.has_work, engine.runner.steps, engine.runner.last_step_s) == (True, steps, since)
        assert not engine.deaths
    finally:
        engine.thaw()
    same_tokens(engine, asked, expected, engine.answer(asked).tokens)
    assert not engine.runner.has_work


def test_its_death_is_told_once_and_leaves_no_process(engine: Driven) -> None:
    lost = request(PROMPT, max_tokens=900)
    engine.submit(lost)
    engine.begun(lost)
    engine.kill()
    engine.until(lambda: engine.deaths, "the death is told")
    assert "SIGKILL" in engine.deaths[0]
    engine.until(lambda: not engine.processes(), "nothing of it is left")
    engine.submit(request(PROMPT))
    assert not engine.runner.has_work
    assert len(engine.deaths) == 1
    assert not engine.answers[lost.key].finish


@pytest.fixture(scope="module")
def restarted(aggregated: Driven, expected: list[int]) -> Iterator[Driven]:
    """What the node does after a death: the same arguments, the same folder, another epoch."""
    if not aggregated.deaths:
        aggregated.kill()
        aggregated.until(lambda: aggregated.deaths, "the death is told")
    aggregated.close()
    later = aggregated.again()
    yield later
    later.close()


def test_it_starts_again_and_answers_the_same(restarted: Driven, aggregated: Driven, expected: list[int]) -> None:
    assert restarted.info.weights == aggregated.info.weights
    assert restarted.info.card == aggregated.info.card
    asked = request(PROMPT, max_tokens=NEW_TOKENS)
    (answer,) = restarted.ask(asked)
    assert answer.cached == 0, "another process, an empty cache"
    same_tokens(restarted, asked, expected, answer.tokens)
    restarted.nothing_is_used()


def test_it_ends_when_closed_whatever_it_does(restarted: Driven) -> None:
    running = request(PROMPT, max_tokens=900)
    restarted.submit(running)
    restarted.begun(running)
    restarted.close()
    assert restarted.processes() == []
    assert restarted.deaths == []
