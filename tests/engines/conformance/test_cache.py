"""KV events beside the engine's own report: what a prompt finds in the cache is what the events said was there."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from engines.conformance.bench import Driven, request


@pytest.fixture(autouse=True)
def has_events(engine: Driven) -> None:
    engine.needs("kv events")


def words(length: int, seed: int) -> list[int]:
    draw = random.Random(f"cache {seed}")
    return [draw.randrange(97, 123) for _ in range(length)]


def agree(engine: Driven, prompt: Sequence[int], salt: str = "") -> int:
    """Ask, and compare what came from the cache with what the events promised. The last token is always computed, so
    that the block that ends with it is never all used."""
    engine.settle()
    size = engine.info.block_size
    told = min(engine.stored(prompt, salt), (len(prompt) - 1) // size * size)
    (answer,) = engine.ask(request(prompt, max_tokens=1, cache_salt=salt))
    assert answer.cached == told, f"of {len(prompt)} tokens"
    return told


def test_events_tell_what_a_prompt_leaves_in_the_cache(engine: Driven) -> None:
    size = engine.info.block_size
    for length in (size - 1, size, size + 1, 3 * size, 3 * size + 5):
        prompt = words(length, length)
        assert agree(engine, prompt) == 0
        engine.settle()
        assert engine.stored(prompt) == length // size * size
        assert agree(engine, prompt) == (length - 1) // size * size


def test_the_answer_is_cached_too(engine: Driven) -> None:
    size = engine.info.block_size
    turn = words(size + 5, 1)
    turn += engine.text(turn, max_tokens=2 * size) + words(3, 2)
    assert agree(engine, turn) == 3 * size


def test_salts_share_nothing(engine: Driven) -> None:
    engine.needs("cache_salt")
    prompt = words(4 * engine.info.block_size + 1, 3)
    assert agree(engine, prompt) == 0
    assert agree(engine, prompt, "one") == 0
    assert agree(engine, prompt, "other") == 0
    assert agree(engine, prompt, "one") == 4 * engine.info.block_size
    assert agree(engine, prompt) == 4 * engine.info.block_size


def test_what_is_evicted_is_told_as_removed(engine: Driven) -> None:
    size, context = engine.info.block_size, engine.info.context
    first = words(6 * size + 1, 4)
    engine.ask(request(first, max_tokens=1))
    for seed in range(engine.info.kv_blocks * size // (context - 8) + 1):
        engine.ask(request(words(context - 8, 100 + seed), max_tokens=1))
    engine.settle()
    assert engine.stored(first) == 0
    assert engine.stored_blocks() <= engine.info.kv_blocks
    assert agree(engine, first) == 0
    assert agree(engine, first) == 6 * size


def test_events_and_cache_agree_whatever_is_asked(engine: Driven) -> None:
    """Prompts that share prefixes, more of them than the cache holds, some of them aborted."""
    draw = random.Random(9)
    size, context = engine.info.block_size, engine.info.context
    families = [words(context - 40, 10 + family) for family in range(4)]
    hits = 0
    for number in range(24):
        family = draw.choice(families)
        prompt = family[: draw.randrange(1, context - 40)] + words(draw.randrange(1, 2 * size), 1000 + number)
        hits += agree(engine, prompt) > 0
        if draw.random() < 0.3:
            given_up = request(draw.choice(families) + words(20, number), max_tokens=15)
            engine.submit(given_up)
            if draw.random() < 0.5:
                engine.begun(given_up)
            engine.abort(given_up)
            engine.nothing_is_used()
    assert hits > 4
