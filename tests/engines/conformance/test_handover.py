"""Prefill in one engine, decode in another: the tokens of one engine alone, and nothing held longer than needed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from engines.conformance.bench import Answer, Bench, Driven, request, same_tokens
from support.moves import copy

from p2pdyn.engines.base import Held, Release, Reserved, Sequence, Settle

NEW_TOKENS = 16


class Pair(NamedTuple):
    prefill: Driven
    decode: Driven

    def nothing_is_used(self) -> None:
        for engine in self:
            engine.nothing_is_used()


@pytest.fixture(scope="module")
def pair(bench: Bench, aggregated: Driven) -> Iterator[Pair]:
    aggregated.needs("hand over")
    made = Pair(*bench.start("prefill", "decode"))
    yield made
    for engine in made:
        engine.close()


def words(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(f"hand over {length} {seed}")
    return [draw.randrange(97, 123) for _ in range(length)]


def hand_over(pair: Pair, prompt: list[int], **params: Any) -> tuple[Sequence, Held]:
    asked = replace(request(prompt, max_tokens=NEW_TOKENS, **params), hand_over=True)
    pair.prefill.submit(asked)
    return asked, pair.prefill.told(Held, asked)


def decode(pair: Pair, handed: Sequence, held: Held, filled: bool = True) -> Answer:
    """Take over by the engine's own means; not ``filled``: what arrives is no KV."""
    prompt = handed.tokens
    asked = request(prompt, max_tokens=NEW_TOKENS)
    if pair.decode.info.moves_kv:
        pair.decode.submit(replace(asked, remote=held.params if filled else b"\x01nonsense"))
        answer = pair.decode.answer(asked)
        pair.prefill.order(Release(held.key))
        pair.prefill.handed_over(handed)
        return answer
    pair.decode.submit(replace(asked, pull=len(held.blocks)))
    if held.blocks:
        reserved = pair.decode.told(Reserved, asked)
        assert reserved.keys == held.keys[reserved.first :]
        if filled:
            _move(pair, held, reserved)
        if reserved.blocks:
            pair.decode.order(Settle(asked.key, len(reserved.blocks) if filled else 0))
    pair.prefill.order(Release(held.key))
    return pair.decode.answer(asked)


def _move(pair: Pair, held: Held, reserved: Reserved) -> None:
    """As the movers do it: from one engine's memory into the other's."""
    source, target = pair.prefill.runner.memory, pair.decode.runner.memory
    assert source is not None
    assert target is not None
    copy(source, held.blocks[reserved.first :], target, reserved.blocks, pair.decode.info.block_bytes)


def test_both_say_how_they_move_kv(pair: Pair) -> None:
    for engine in pair:
        assert bool(engine.info.moves_kv) != bool(engine.info.block_bytes), "either by itself or by the peers' movers"
    assert pair.prefill.info.moves_kv == pair.decode.info.moves_kv
    assert pair.prefill.info.block_bytes == pair.decode.info.block_bytes


@pytest.mark.parametrize("blocks", [0.5, 1.0, 2.3, 8.0, 20.1])
def test_the_answer_is_that_of_one_engine(engine: Driven, pair: Pair, blocks: float) -> None:
    prompt = words(int(blocks * engine.info.block_size))
    answer = decode(pair, *hand_over(pair, prompt))
    assert answer.finish == "length", answer.detail
    asked, expected = request(prompt, max_tokens=NEW_TOKENS), engine.text(prompt, max_tokens=NEW_TOKENS)
    same_tokens(engine, asked, expected, answer.tokens)
    pair.nothing_is_used()


def test_it_is_so_too_where_some_of_it_is_cached(engine: Driven, pair: Pair) -> None:
    prompt = words(6 * engine.info.block_size + 3, 1)
    asked, expected = request(prompt, max_tokens=NEW_TOKENS), engine.text(prompt, max_tokens=NEW_TOKENS)
    head = prompt[: 2 * engine.info.block_size + 1]
    for begun in (head, prompt, prompt):
        answer = decode(pair, *hand_over(pair, begun))
    same_tokens(engine, asked, expected, answer.tokens)
    pair.nothing_is_used()


def test_a_hand_over_tells_no_token_and_its_release_frees_all(pair: Pair) -> None:
    asked, held = hand_over(pair, words(200))
    assert bool(held.params) == bool(pair.prefill.info.moves_kv)
    pair.prefill.order(Release(held.key), Release(10**9))
    pair.prefill.handed_over(asked)
    pair.nothing_is_used()
    assert asked.key not in pair.prefill.answers


def test_an_aborted_prefill_holds_nothing(pair: Pair) -> None:
    asked = replace(request(words(900), max_tokens=NEW_TOKENS), hand_over=True)
    pair.prefill.submit(asked)
    pair.prefill.abort(asked)
    pair.nothing_is_used()
    assert not [note for note in pair.prefill.notes if note.key == asked.key]


def test_what_was_not_moved_is_computed_or_refused(engine: Driven, pair: Pair) -> None:
    """Never a wrong token, and the next one is served as ever."""
    prompt = words(5 * engine.info.block_size + 2, 2)
    expected = engine.text(prompt, max_tokens=NEW_TOKENS)
    answer = decode(pair, *hand_over(pair, prompt), filled=False)
    if answer.finish == "error":
        assert answer.tokens == []
        assert answer.detail
    else:
        same_tokens(engine, request(prompt, max_tokens=NEW_TOKENS), expected, answer.tokens)
    again = decode(pair, *hand_over(pair, prompt))
    same_tokens(engine, request(prompt, max_tokens=NEW_TOKENS), expected, again.tokens)
    pair.nothing_is_used()
