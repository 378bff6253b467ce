"""What every engine owes whoever moves its KV blocks: the same tokens, and every block back."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support import moves
from support.engines import Mirror, Result, generate, sequence, text

from p2pdyn.engines.base import Engine, Held, Pin, Release, Reserved, Settle
from p2pdyn.engines.paged import BlockNames, hash_of

MakeEngine = Callable[..., Engine]
SIZE = 4
GREEDY: dict[str, Any] = {"max_tokens": 20}
SEEDED: dict[str, Any] = {"max_tokens": 20, "temperature": 0.8, "seed": 7, "top_p": 0.9}


def prompt(length: int, seed: int = 0) -> list[int]:
    return [97 + (i * i + 7 * i + 11 * seed) % 26 for i in range(length)]


def handed_over(source: Engine, target: Engine, tokens: list[int], key: int = 1, **params: Any) -> Result:
    """Prefill in ``source``, everything else in ``target``."""
    held = moves.hand_over(source, key, tokens, **params)
    reserved = moves.reserve(target, key, len(held.keys), tokens, **params)
    if reserved.blocks:
        moves.pull(source, held, target, reserved)
    results: dict[int, Result] = {}
    assert moves.run(target, results) == []
    return results[key]


def everything_is_back(*engines: Any) -> None:
    for engine in engines:
        assert (engine.lending.held, engine.lending.foreign) == ({}, {})
        engine.check()
        load = engine.load_report()
        assert (load.active_requests, load.active_blocks, load.queued, load.prefill_tokens_queued) == (0, 0, 0, 0)
        assert not any(moves.memory(engine)[moves.block_bytes(engine) * engine.cache.blocks :])
        assert engine.next_step(0.0) is None


# ---- prefill there, decode here


@pytest.mark.parametrize("params", [GREEDY, SEEDED, GREEDY | {"cache_salt": "tenant"}, GREEDY | {"lora": "adapter"}])
@pytest.mark.parametrize("length", [5, 8, 9, 41])
def test_the_answer_is_that_of_one_worker(make_engine: MakeEngine, params: dict[str, Any], length: int) -> None:
    alone = text(make_engine(), prompt(length), **params)
    source, target = make_engine(), make_engine()
    generate(target, sequence(99, prompt(13, 5), max_tokens=9))  # so that the blocks have other numbers here

    result = handed_over(source, target, prompt(length), **params)

    assert result.tokens == alone
    assert result.cached == (length - 1) // SIZE * SIZE
    everything_is_back(source, target)


def test_a_hand_over_tells_blocks_keys_generations_and_no_token(make_engine: MakeEngine) -> None:
    engine = make_engine()
    generate(engine, sequence(0, prompt(9), max_tokens=1))

    held = moves.hand_over(engine, 1, prompt(41))

    assert len(held.blocks) == len(held.keys) == len(held.generations) == 10
    assert len(set(held.blocks)) == 10
    assert {len(key) for key in held.keys} == {16}
    assert held.cached == 8
    load = engine.load_report()
    assert (load.active_requests, load.active_blocks, load.kv_used) == (0, 10, 10)
    engine.transfer(Release(1), 0.0)
    everything_is_back(engine)


def test_output_of_an_earlier_attempt_is_part_of_what_is_handed_over(make_engine: MakeEngine) -> None:
    whole = text(make_engine(), prompt(10), max_tokens=24)
    source, target = make_engine(), make_engine()

    held = moves.hand_over(source, 1, prompt(10), whole[:9], max_tokens=24)
    reserved = moves.reserve(target, 1, len(held.keys), prompt(10), whole[:9], max_tokens=24)
    moves.pull(source, held, target, reserved)

    assert len(held.blocks) == 18 // SIZE
    assert generate(target)[1].tokens == whole[9:]


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE])
def test_a_prompt_of_no_full_block_has_nothing_to_hand_over(make_engine: MakeEngine, length: int) -> None:
    source, target = make_engine(), make_engine()

    held = moves.hand_over(source, 1, prompt(length))
    target.submit(replace(sequence(1, prompt(length), max_tokens=6), pull=3), 0.0)
    results: dict[int, Result] = {}
    notes = moves.run(target, results)

    assert (held.blocks, held.keys, held.generations) == ((), (), ())
    assert notes == [Reserved(1, 0, (), ())]
    assert results[1].tokens == text(make_engine(), prompt(length), max_tokens=6)
    everything_is_back(source, target)


def test_many_at_once_among_others(make_engine: MakeEngine) -> None:
    """Hand-overs and ordinary sequences share the batches of one worker, pulls and ordinary ones those of another."""
    alone = [text(make_engine(), prompt(6 + 7 * i, i), max_tokens=12) for i in range(8)]
    source, target = make_engine(), make_engine(max_num_seqs=6)
    for i in range(8):
        job = sequence(i, prompt(6 + 7 * i, i), max_tokens=12)
        source.submit(replace(job, hand_over=i % 2 == 0), 0.0)
    first: dict[int, Result] = {}
    held = {note.key: note for note in moves.run(source, first) if isinstance(note, Held)}
    assert (set(first), set(held)) == ({1, 3, 5, 7}, {0, 2, 4, 6})

    results: dict[int, Result] = {}
    for i in range(8):
        job = sequence(i, prompt(6 + 7 * i, i), max_tokens=12)
        target.submit(replace(job, pull=len(held[i].keys) if i in held else 0), 0.0)
    while notes := moves.run(target, results):
        for note in notes:
            assert isinstance(note, Reserved)
            moves.pull(source, held[note.key], target, note)

    assert [first[i].tokens for i in (1, 3, 5, 7)] == alone[1::2]
    assert [results[i].tokens for i in range(8)] == alone
    everything_is_back(source, target)


def test_what_the_reader_has_is_not_reserved(make_engine: MakeEngine) -> None:
    source, target, mirror = make_engine(), make_engine(), Mirror(SIZE)
    generate(target, sequence(0, prompt(41)[:22], max_tokens=1), mirror=mirror)
    held = moves.hand_over(source, 1, prompt(41))

    reserved = moves.reserve(target, 1, len(held.keys), prompt(41), max_tokens=8)
    assert (reserved.first, len(reserved.blocks), reserved.keys) == (5, 5, held.keys[5:])
    moves.pull(source, held, target, reserved)

    results: dict[int, Result] = {}
    moves.run(target, results, mirror)
    assert results[1].tokens == text(make_engine(), prompt(41), max_tokens=8)
    assert set(mirror.blocks) == set(target.cache.report())  # type: ignore[attr-defined]


def test_nothing_is_reserved_if_all_is_here(make_engine: MakeEngine) -> None:
    target = make_engine()
    first = text(target, prompt(41), max_tokens=8)

    target.submit(replace(sequence(1, prompt(41), max_tokens=8), pull=10), 0.0)
    results: dict[int, Result] = {}
    notes = moves.run(target, results)

    assert notes == [Reserved(1, 10, (), ())]
    assert results[1].tokens == first


@pytest.mark.parametrize("pull", [3, 10, 11, 50])
def test_the_last_token_is_always_computed_here(make_engine: MakeEngine, pull: int) -> None:
    reserved = moves.reserve(make_engine(), 1, pull, prompt(41))

    assert len(reserved.blocks) == min(pull, 10)


@pytest.mark.parametrize("filled", [0, 1, 4, 9, 10])
def test_what_did_not_come_is_computed(make_engine: MakeEngine, filled: int) -> None:
    source, target, mirror = make_engine(), make_engine(), Mirror(SIZE)
    held = moves.hand_over(source, 1, prompt(41))
    reserved = moves.reserve(target, 1, 10, prompt(41), max_tokens=8)
    for block in reserved.blocks[filled:]:
        size = moves.block_bytes(target)
        moves.memory(target)[block * size : (block + 1) * size] = bytes([165]) * size  # half read

    moves.pull(source, held, target, reserved, filled)

    rest = 41 - filled * SIZE
    assert rest - target.load_report().prefill_tokens_queued in ([0] if rest > 1 else [0, 1])  # one: as if it decoded
    results: dict[int, Result] = {}
    moves.run(target, results, mirror)
    assert results[1].tokens == text(make_engine(), prompt(41), max_tokens=8)
    assert results[1].cached == filled * SIZE
    assert set(mirror.blocks) == set(target.cache.report())  # type: ignore[attr-defined]
    everything_is_back(source, target)


@pytest.mark.parametrize("block", range(4))
def test_a_wrong_byte_would_show(make_engine: MakeEngine, block: int) -> None:
    """So the tests above prove that the bytes, and no others, were read."""
    params: dict[str, Any] = {"max_tokens": 12, "logprobs": 3}
    alone = generate(make_engine(), sequence(0, prompt(18), **params))[0]
    source, target = make_engine(), make_engine()
    held = moves.hand_over(source, 1, prompt(18), **params)
    reserved = moves.reserve(target, 1, 4, prompt(18), **params)
    moves.memory(source)[held.blocks[block] * moves.block_bytes(source) + 3] ^= 1  # of a float, the exponent

    moves.pull(source, held, target, reserved)

    result = generate(target)[1]
    assert (result.tokens, result.logprobs) != (alone.tokens, alone.logprobs)


def test_two_that_pull_the_same_prefix_share_it_afterwards(make_engine: MakeEngine) -> None:
    source, target, mirror = make_engine(), make_engine(), Mirror(SIZE)
    held = moves.hand_over(source, 1, prompt(41))
    both = [moves.reserve(target, key, 10, prompt(41), max_tokens=8) for key in (1, 2)]
    assert not set(both[0].blocks) & set(both[1].blocks)

    for reserved in both:
        moves.copy(moves.memory(source), held.blocks, moves.memory(target), reserved.blocks, moves.block_bytes(target))
        target.transfer(Settle(reserved.key, 10), 0.0)

    results: dict[int, Result] = {}
    moves.run(target, results, mirror)
    assert results[1].tokens == results[2].tokens == text(make_engine(), prompt(41), max_tokens=8)
    everything_is_back(target)


# ---- waiting and load


def test_a_sequence_that_waits_for_blocks_computes_nothing_and_holds_its_place(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    moves.reserve(engine, 1, 10, prompt(41), max_tokens=3)
    engine.submit(sequence(2, prompt(9, 2), max_tokens=3), 0.0)

    assert generate(engine) == {}
    load = engine.load_report()
    assert (load.active_requests, load.queued, load.active_blocks) == (1, 1, 11)
    assert load.prefill_tokens_queued == 1 + 9  # what is to come is not for this engine to compute

    engine.transfer(Settle(1, 0), 0.0)
    assert engine.load_report().prefill_tokens_queued == 41 + 9
    assert {key: len(result.tokens) for key, result in generate(engine).items()} == {1: 3, 2: 3}
    everything_is_back(engine)


def test_others_run_on_while_one_waits(make_engine: MakeEngine) -> None:
    engine = make_engine()
    moves.reserve(engine, 1, 10, prompt(41), max_tokens=3)

    assert generate(engine, sequence(2, prompt(9, 2), max_tokens=30))[2].finish == "length"


def test_decoding_preempts_nobody_who_waits_for_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=16, context=64)
    alone = text(make_engine(), prompt(6), max_tokens=50)
    engine.submit(sequence(2, prompt(6), max_tokens=50), 0.0)
    engine.submit(replace(sequence(1, prompt(41), max_tokens=3), pull=10), 0.0)  # the younger one

    results: dict[int, Result] = {}
    (reserved,) = moves.run(engine, results)
    load = engine.load_report()  # the other is put back: its next block is with the one that waits
    assert (load.active_requests, load.queued, load.active_blocks) == (1, 1, 11)
    engine.transfer(Settle(reserved.key, 0), 0.0)
    moves.run(engine, results)

    assert results[2].tokens == alone
    assert len(results[1].tokens) == 3
    everything_is_back(engine)


def test_held_blocks_are_not_reused_and_whoever_needs_them_waits(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=16, context=64)
    held = moves.hand_over(engine, 1, prompt(41))
    size = moves.block_bytes(engine)
    before = [bytes(moves.memory(engine)[block * size : (block + 1) * size]) for block in held.blocks]
    engine.submit(sequence(2, prompt(30, 2), max_tokens=3), 0.0)
    for key in range(3, 9):
        generate(engine, sequence(key, prompt(12, key), max_tokens=5))

    assert engine.load_report().queued == 7  # in order of arrival: the first does not fit
    assert [bytes(moves.memory(engine)[block * size : (block + 1) * size]) for block in held.blocks] == before
    engine.transfer(Release(1), 0.0)
    assert set(generate(engine)) == {2, 3, 4, 5, 6, 7, 8}
    everything_is_back(engine)


# ---- pins


def test_a_pin_holds_the_longest_cached_prefix(make_engine: MakeEngine) -> None:
    engine = make_engine()
    keys = moves.hand_over(engine, 1, prompt(41)).keys
    engine.transfer(Release(1), 0.0)
    other = moves.hand_over(make_engine(), 1, prompt(22) + prompt(20, 3)).keys
    assert (keys[:5] == other[:5], keys[5] == other[5]) == (True, False)

    whole, part = moves.pin(engine, 2, keys), moves.pin(engine, 3, other)

    assert (whole.keys, part.keys) == (keys, keys[:5])
    assert part.blocks == whole.blocks[:5]
    assert engine.load_report().active_blocks == 10
    engine.transfer(Release(2), 0.0)
    assert engine.load_report().active_blocks == 5
    assert moves.tag(engine, part.blocks[0])[0] == keys[0][:8]
    engine.transfer(Release(3), 0.0)
    everything_is_back(engine)


def test_a_pin_of_what_is_not_here_holds_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    generate(engine, sequence(0, prompt(41), max_tokens=1))

    held = moves.pin(engine, 2, (bytes(16), bytes(16)))

    assert (held.blocks, held.keys, held.generations) == ((), (), ())
    everything_is_back(engine)


def test_a_pulled_prefix_serves_a_prompt_that_only_begins_with_it(make_engine: MakeEngine) -> None:
    source, target = make_engine(), make_engine()
    generate(source, sequence(0, prompt(41), max_tokens=1))
    turn = prompt(25) + prompt(30, 4)
    reserved = moves.reserve(target, 1, 6, turn, max_tokens=8)

    moves.pull(source, moves.pin(source, 7, reserved.keys), target, reserved)

    assert generate(target)[1].tokens == text(make_engine(), turn, max_tokens=8)
    everything_is_back(source, target)


def test_a_pin_is_answered_while_others_run(make_engine: MakeEngine) -> None:
    engine = make_engine()
    keys = moves.hand_over(engine, 1, prompt(41)).keys
    engine.submit(sequence(2, prompt(9, 2), max_tokens=30), 0.0)
    engine.step(0.0)

    assert moves.pin(engine, 3, keys).keys == keys


# ---- abort, failure


@pytest.mark.parametrize("steps", range(4))
def test_aborting_a_hand_over(make_engine: MakeEngine, steps: int) -> None:
    engine = make_engine()
    engine.submit(sequence(2, prompt(9, 2), max_tokens=3), 0.0)
    engine.submit(replace(sequence(1, prompt(300)), hand_over=True), 0.0)
    notes = [note for _ in range(steps) for note in engine.step(0.0).transfers]

    engine.abort(1, 0.0)
    notes += moves.run(engine, {2: Result()})

    assert len(engine.lending.held) == len(notes)  # type: ignore[attr-defined]
    engine.transfer(Release(1), 0.0)
    everything_is_back(engine)


@pytest.mark.parametrize("filled", [0, 3, 10])
def test_aborted_while_it_waits_its_blocks_stay_until_settle(make_engine: MakeEngine, filled: int) -> None:
    engine = make_engine()
    generate(engine, sequence(0, prompt(10), max_tokens=1))
    moves.reserve(engine, 1, 10, prompt(41))

    engine.abort(1, 0.0)
    load = engine.load_report()
    assert (load.active_requests, load.active_blocks, load.prefill_tokens_queued) == (0, 8, 0)
    engine.transfer(Settle(1, filled), 0.0)

    everything_is_back(engine)


def test_aborted_while_it_waits_its_blocks_stay_until_release_if_something_may_still_write(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    moves.reserve(engine, 1, 10, prompt(41))
    engine.abort(1, 0.0)

    engine.transfer(Settle(1, 0, over=False), 0.0)
    assert engine.load_report().active_blocks == 10
    engine.transfer(Release(1), 0.0)

    everything_is_back(engine)


def test_aborted_before_it_has_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    moves.reserve(engine, 1, 10, prompt(41))
    engine.submit(replace(sequence(2, prompt(41, 2)), pull=10), 0.0)

    engine.abort(2, 0.0)
    engine.transfer(Settle(2, 4), 0.0)
    engine.transfer(Settle(1, 0), 0.0)

    assert set(generate(engine)) == {1}
    everything_is_back(engine)


def test_what_may_still_be_written_is_left_and_others_are_taken(make_engine: MakeEngine) -> None:
    engine = make_engine()
    alone = text(make_engine(), prompt(41), max_tokens=8)
    generate(engine, sequence(0, prompt(10), max_tokens=1))
    reserved = moves.reserve(engine, 1, 10, prompt(41), max_tokens=8)

    engine.transfer(Settle(1, 0, over=False), 0.0)
    assert engine.load_report().queued == 1
    engine.step(0.0)
    size = moves.block_bytes(engine)
    for block in reserved.blocks:  # late
        moves.memory(engine)[block * size : (block + 1) * size] = bytes([165]) * size

    assert alone[-7:] == generate(engine)[1].tokens[-7:]
    assert engine.load_report().active_blocks == 8
    engine.transfer(Release(1), 0.0)
    everything_is_back(engine)


def test_who_goes_back_is_the_next_to_be_admitted(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    moves.reserve(engine, 1, 10, prompt(41), max_tokens=2)
    engine.submit(sequence(2, prompt(9, 2), max_tokens=2), 0.0)

    engine.transfer(Settle(1, 0, over=False), 0.0)

    assert list(generate(engine)) == [1, 2]
    engine.transfer(Release(1), 0.0)


def test_orders_for_unknown_keys_are_ignored(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.submit(sequence(1, prompt(9), max_tokens=3), 0.0)
    engine.step(0.0)
    for key in (1, 9):
        for order in (Release(key), Settle(key, 3), Settle(key, 0, over=False)):
            engine.transfer(order, 0.0)

    assert len(generate(engine)[1].tokens) == 2
    everything_is_back(engine)


@pytest.mark.parametrize("length", [0, 600])
def test_a_hand_over_that_no_worker_of_the_model_could_run_is_invalid(make_engine: MakeEngine, length: int) -> None:
    engine = make_engine()
    results: dict[int, Result] = {}
    engine.submit(replace(sequence(1, prompt(length)), hand_over=True), 0.0)

    assert moves.run(engine, results) == []
    assert results[1].finish == "invalid"


def test_closing_gives_everything_back(make_engine: MakeEngine) -> None:
    engine: Any = make_engine()
    held = moves.hand_over(engine, 1, prompt(41))
    moves.reserve(engine, 2, 10, prompt(41, 2))
    moves.reserve(engine, 3, 10, prompt(41, 3))
    engine.abort(3, 0.0)
    engine.transfer(Pin(4, held.keys), 0.0)
    view = moves.memory(engine)[:100]

    engine.close()

    assert (engine.lending.held, engine.lending.foreign) == ({}, {})
    engine.cache.check([])
    assert engine.next_step(0.0) is None
    assert len(view) == 100


# ---- tags, generations


def test_tags_name_what_is_held_and_nothing_else(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=16, context=64)
    for use in (1, 2, 3):
        held = moves.hand_over(engine, use, prompt(57, use))
        for block, key, generation in zip(held.blocks, held.keys, held.generations, strict=True):
            assert moves.tag(engine, block) == (key[:8], 0, generation)
        engine.transfer(Release(use), 0.0)
        assert not any(any(struct.pack("<8sQQ", *moves.tag(engine, block))) for block in range(16))
    assert max(held.generations) > 1  # the blocks went around


def test_the_generation_counts_uses_not_reads(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=16, context=64)
    keys = moves.hand_over(engine, 1, prompt(41)).keys
    engine.transfer(Release(1), 0.0)
    first = moves.pin(engine, 2, keys)
    engine.transfer(Release(2), 0.0)
    again = moves.pin(engine, 3, keys)
    engine.transfer(Release(3), 0.0)
    generate(engine, sequence(4, prompt(60, 4), max_tokens=2))
    anew = moves.hand_over(engine, 5, prompt(41))

    assert (first.blocks, first.generations) == (again.blocks, again.generations)
    older = dict(zip(first.blocks, first.generations, strict=True))
    assert all(now > older.get(block, 0) for block, now in zip(anew.blocks, anew.generations, strict=True))
    engine.transfer(Release(5), 0.0)


# ---- keys


def keys_of(card: bytes, weights: str, size: int, salt: str, lora: str, tokens: bytes) -> tuple[bytes, ...]:
    chain = BlockNames(card, weights, size).chain(salt, lora)
    chain.extend(tokens)
    return tuple(chain.keys)


def test_keys_of_unlike_things_never_match() -> None:
    tokens = bytes(range(256)) * 4
    unlike = [
        (b"card", "weights", 4, "", ""),
        (b"card", "other weights", 4, "", ""),
        (b"card2", "weights", 4, "", ""),
        (b"cardw", "eights", 4, "", ""),
        (b"card", "weights", 8, "", ""),
        (b"card", "weights", 4, "a", ""),
        (b"card", "weights", 4, "", "a"),
        (b"card", "weights", 4, "a", "b"),
        (b"card", "weights", 4, "ab", ""),
        (b"card", "weights", 4, "", "ab"),
        (b"card", "weights", 4, "", tokens[:64].decode("latin-1")),
    ]
    keys = [keys_of(*what, tokens) for what in unlike]

    assert len({key for several in keys for key in several}) == sum(len(several) for several in keys)


def test_keys_do_not_depend_on_how_the_tokens_came() -> None:
    names, tokens = BlockNames(b"card", "weights", 4), bytes(range(160))
    whole, parts = names.chain("s", "l"), names.chain("s", "l")
    whole.extend(tokens)
    for start in range(0, 160, 32):
        parts.extend(tokens[start : start + 32])
    short = names.chain("s", "l")
    short.extend(tokens[:79])

    assert parts.keys == whole.keys
    assert short.keys == whole.keys[:4]
    assert len({hash_of(key) for key in whole.keys}) == 10


def test_engines_of_one_model_have_the_same_keys(make_engine: MakeEngine) -> None:
    keys = [moves.hand_over(make_engine(), 1, prompt(41)).keys for _ in range(2)]
    other = moves.hand_over(make_engine(block_size=8), 1, prompt(41)).keys

    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(other)
