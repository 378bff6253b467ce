"""The engines whose KV cache is ours, step by step: exactly the same tokens however they come about, and events that
tell the cache at every step. What every engine owes, through its host child, is in tests/engines/conformance."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engines import Mirror, Result, collect, generate, sequence, text

from p2pdyn.engines.base import Engine

MakeEngine = Callable[..., Engine]

SAMPLING = [
    pytest.param({"temperature": 0.0}, id="greedy"),
    pytest.param({"temperature": 0.8, "seed": 7, "top_p": 0.9, "top_k": 12}, id="seeded"),
]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Ordinary bytes, so within any vocabulary."""
    draw = random.Random(seed)
    return [draw.randrange(97, 123) for _ in range(length)]


@pytest.mark.parametrize("params", SAMPLING)
def test_a_sequence_does_not_depend_on_its_batch(make_engine: MakeEngine, params: dict[str, Any]) -> None:
    alone = [text(make_engine(), prompt(5 + 9 * i, i), max_tokens=20, **params) for i in range(8)]

    together = generate(make_engine(), *(sequence(i, prompt(5 + 9 * i, i), max_tokens=20, **params) for i in range(8)))

    assert [together[i].tokens for i in range(8)] == alone


@pytest.mark.parametrize("params", SAMPLING)
@pytest.mark.parametrize("done", [1, 3, 4, 11, 23])
def test_another_worker_goes_on_identically(make_engine: MakeEngine, params: dict[str, Any], done: int) -> None:
    whole = text(make_engine(), prompt(18), max_tokens=24, **params)

    rest = text(make_engine(), prompt(18), whole[:done], max_tokens=24, **params)

    assert whole[:done] + rest == whole


@pytest.mark.parametrize("length", [0, 32, 33])
def test_what_no_worker_of_the_model_could_run_is_invalid(make_engine: MakeEngine, length: int) -> None:
    result = generate(make_engine(context=32), sequence(0, prompt(length), max_tokens=4))[0]

    assert (result.tokens, result.finish) == ([], "invalid")
    assert "prompt" in result.detail


def test_more_sequences_than_places_all_end(make_engine: MakeEngine) -> None:
    results = generate(make_engine(max_num_seqs=3), *(sequence(i, prompt(6, i), max_tokens=3) for i in range(20)))

    assert {key: len(result.tokens) for key, result in results.items()} == dict.fromkeys(range(20), 3)


# ---- abort


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_sequence_produces_nothing_more(make_engine: MakeEngine, steps: int) -> None:
    engine = make_engine(max_num_seqs=2)
    other = text(engine, prompt(9, 2), max_tokens=12)
    for key in (1, 2, 3):
        engine.submit(sequence(key, prompt(9, key), max_tokens=12), 0.0)
    for _ in range(steps):
        engine.step(0.0)

    engine.abort(1, 0.0)
    engine.abort(3, 0.0)  # this one still waits
    engine.abort(99, 0.0)
    results = generate(engine)

    assert set(results) <= {2}
    assert results[2].tokens == other[-len(results[2].tokens) :]
    assert engine.load_report().active_blocks == 0


def test_aborting_all_makes_the_engine_idle(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for key in range(4):
        engine.submit(sequence(key, prompt(9, key), max_tokens=12), 0.0)
    engine.step(0.0)
    for key in range(4):
        engine.abort(key, 0.0)

    assert generate(engine) == {}


# ---- prefix cache


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (41, 40)])
def test_a_repeated_prompt_is_served_from_the_cache(make_engine: MakeEngine, length: int, cached: int) -> None:
    engine = make_engine(block_size=4)
    first = generate(engine, sequence(0, prompt(length), max_tokens=6))[0]
    second = generate(engine, sequence(1, prompt(length), max_tokens=6))[1]

    assert (first.cached, second.cached) == (0, cached)
    assert second.tokens == first.tokens


def test_the_output_too_can_be_reused(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    turn = prompt(10) + text(engine, prompt(10), max_tokens=15) + prompt(3, 1)

    result = generate(engine, sequence(1, turn, max_tokens=6))[1]

    assert result.cached == 24
    assert result.tokens == text(make_engine(), turn, max_tokens=6)


@pytest.mark.parametrize("field", ["cache_salt", "lora"])
def test_salts_and_loras_share_nothing(make_engine: MakeEngine, field: str) -> None:
    engine = make_engine(block_size=4)
    generate(engine, sequence(0, prompt(41), max_tokens=2))

    assert generate(engine, sequence(1, prompt(41), max_tokens=2, **{field: "a"}))[1].cached == 0
    assert generate(engine, sequence(2, prompt(41), max_tokens=2, **{field: "b"}))[2].cached == 0
    assert generate(engine, sequence(3, prompt(41), max_tokens=2, **{field: "a"}))[3].cached == 40


# ---- random workloads on a small pool

JOBS = st.lists(
    st.tuples(
        st.integers(0, 3),  # which family of prompts: those of one share their beginning
        st.integers(1, 40),  # prompt length
        st.integers(1, 20),  # max_tokens
        st.integers(0, 12),  # steps before it is submitted
        st.one_of(st.none(), st.integers(0, 20)),  # steps before it is aborted
    ),
    min_size=1,
    max_size=14,
)


@given(jobs=JOBS, seqs=st.sampled_from([1, 3, 8]))
@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_eviction_and_preemption_change_no_token(
    make_engine: MakeEngine, jobs: list[tuple[int, int, int, int, int | None]], seqs: int
) -> None:
    """Sixteen blocks for up to 14 sequences of up to 15 blocks each: whatever is evicted, preempted, shared or aborted,
    the tokens are those of the sequence alone, and the events tell the cache exactly, at every step."""
    engine = make_engine(block_size=4, kv_blocks=16, max_num_seqs=seqs, context=64)
    roomy = make_engine(block_size=4, kv_blocks=512, context=64)
    mirror, results, finished = Mirror(4), dict[int, Result](), set[int]()
    coming = sorted((start, key) for key, (_, _, _, start, _) in enumerate(jobs))
    step = 0
    while coming or engine.next_step(0.0) is not None:
        while coming and coming[0][0] <= step:
            key = coming.pop(0)[1]
            family, length, max_tokens, *_ = jobs[key]
            engine.submit(sequence(key, prompt(length, family), max_tokens=max_tokens), 0.0)
        for key, job in enumerate(jobs):
            if job[4] is not None and job[3] + job[4] == step:
                engine.abort(key, 0.0)
                finished.add(key)
        step += 1
        if engine.next_step(0.0) is not None:
            done = engine.step(0.0)
            assert not finished.intersection(output.key for output in done.outputs)
            collect(results, done)
            mirror.apply(done.kv)
            assert set(mirror.blocks) == set(engine.cache.report())  # type: ignore[attr-defined]
        assert step < 5000, "no progress"
    histories = []
    for key, (family, length, max_tokens, _, abort) in enumerate(jobs):
        alone = text(roomy, prompt(length, family), max_tokens=max_tokens)
        got = results.get(key, Result())
        assert got.tokens == (alone if abort is None or got.finish else alone[: len(got.tokens)])
        histories.append((*prompt(length, family), *alone))
    for _, _, tokens in mirror.prefixes():
        assert any(history[: len(tokens)] == tokens for history in histories)
    engine.cache.check([])  # type: ignore[attr-defined]
