"""What an engine answers: the same tokens however they come about, one by one, as far as asked and no further."""

from __future__ import annotations

import math
import random

import pytest
from engines.conformance.bench import Driven, request, same_tokens

from p2pdyn.text.card import ModelCard

HOT = {"temperature": 1.0, "max_tokens": 24}


def prompt(length: int, seed: int = 0) -> list[int]:
    """Letters of the alphabet as bytes: within any vocabulary."""
    draw = random.Random(seed)
    return [draw.randrange(97, 123) for _ in range(length)]


def test_it_says_what_it_is(engine: Driven) -> None:
    info, card = engine.info, ModelCard.unpack(engine.info.card)
    assert info.engine
    assert info.version
    assert info.model
    assert info.weights
    assert set(card.features) == set(info.features)
    assert not set(info.features) & set(engine.subject.cannot), "it claims what the subject says it cannot"
    assert card.context == info.context > 4 * info.block_size
    assert info.kv_blocks * info.block_size >= info.context
    assert info.max_num_seqs > 1
    engine.ask(request(prompt(5), max_tokens=1))
    assert engine.load.kv_total == info.kv_blocks
    assert engine.progress == sorted(engine.progress)
    assert engine.progress[-1] == 1.0


# ---- the same tokens


def test_greedy_is_the_same_again_and_from_a_warm_cache(engine: Driven) -> None:
    asked = request(prompt(100, 1), max_tokens=24)
    (cold,) = engine.ask(asked)
    (warm,) = engine.ask(request(asked.tokens, max_tokens=24))
    assert (len(cold.tokens), cold.finish, cold.cached) == (24, "length", 0)
    assert len(set(cold.tokens)) > 1
    assert warm.cached > 0
    same_tokens(engine, asked, cold.tokens, warm.tokens)


def test_a_sequence_does_not_depend_on_its_batch(engine: Driven) -> None:
    asked = [request(prompt(5 + 9 * i, i), max_tokens=20) for i in range(2 * engine.info.max_num_seqs)]
    together = engine.ask(*asked)
    for one, answer in zip(asked, together, strict=True):
        same_tokens(engine, one, engine.text(one.tokens, max_tokens=20), answer.tokens)


@pytest.mark.parametrize("done", [1, 5, 16, 23])
def test_it_goes_on_behind_what_an_earlier_attempt_produced(engine: Driven, done: int) -> None:
    asked = request(prompt(18), max_tokens=24)
    whole = engine.ask(asked)[0].tokens
    (rest,) = engine.ask(request(prompt(18), whole[:done], max_tokens=24))
    assert rest.finish == "length"
    same_tokens(engine, asked, whole, whole[:done] + rest.tokens)


def test_a_seed_goes_on_behind_what_an_earlier_attempt_produced(engine: Driven) -> None:
    engine.needs("seed", "resumed seed")
    whole = engine.text(prompt(18), seed=7, **HOT)
    assert whole[:11] + engine.text(prompt(18), whole[:11], seed=7, **HOT) == whole


def test_the_seed_decides(engine: Driven) -> None:
    engine.needs("seed")
    one, other, again = (engine.text(prompt(18), seed=seed, **HOT) for seed in (1, 2, 1))
    assert one == again
    assert one != other
    assert len(engine.text(prompt(18), seed=-(2**63), **HOT)) == 24


def test_logprobs_are_of_the_chosen_token_and_of_the_likeliest(engine: Driven) -> None:
    engine.needs("logprobs")
    none, three = engine.ask(*(request(prompt(18), max_tokens=6, logprobs=n) for n in (0, 3)))
    assert [others for _, others in none.logprobs] == [()] * 6
    assert len(three.logprobs) == 6
    for token, (chosen, others) in zip(three.tokens, three.logprobs, strict=True):
        values = [value for _, value in others]
        assert others[0] == (token, chosen), "greedy: the chosen token is the likeliest"
        assert values == sorted(values, reverse=True)
        assert len(others) == 3
        assert sum(math.exp(value) for value in values) <= 1 + 1e-5


# ---- streaming and ends


def test_tokens_are_told_as_they_come(engine: Driven) -> None:
    """One a step; never all at the end."""
    (answer,) = engine.ask(request(prompt(18), max_tokens=64))
    assert sum(answer.deltas) == len(answer.tokens) == 64
    if engine.subject.apart:
        assert len(answer.deltas) > 8
    else:
        assert answer.deltas == [1] * 64


def test_a_stop_token_ends_and_is_the_last(engine: Driven) -> None:
    whole = engine.text(prompt(18), max_tokens=24)
    stop = whole[9]
    (answer,) = engine.ask(request(prompt(18), max_tokens=24, stop_token_ids=(stop,)))
    assert (answer.tokens, answer.finish) == (whole[: whole.index(stop) + 1], "stop")


def test_min_tokens_holds_stop_tokens_back(engine: Driven) -> None:
    engine.needs("min_tokens")
    stop = engine.text(prompt(18), max_tokens=1)[0]
    (answer,) = engine.ask(request(prompt(18), max_tokens=24, min_tokens=6, stop_token_ids=(stop,)))
    assert stop not in answer.tokens[:6]
    assert len(answer.tokens) > 6


def test_an_end_token_ends_unless_ignored(engine: Driven) -> None:
    engine.needs("eos", "seed")
    ends = ModelCard.unpack(engine.info.card).eos_token_ids
    params = {"temperature": 2.0, "max_tokens": engine.info.context // 4}
    stopped = None
    for seed in range(40):
        (answer,) = engine.ask(request(prompt(18), seed=seed, ignore_eos=False, **params))
        if answer.finish == "stop":
            stopped = seed, answer
            break
    assert stopped, "no end token in 40 long answers"
    seed, answer = stopped
    assert [token in ends for token in answer.tokens] == [False] * (len(answer.tokens) - 1) + [True]
    ignored = engine.text(prompt(18), seed=seed, **params)
    assert len(ignored) == params["max_tokens"]


def test_max_tokens_counts_what_was_produced_before(engine: Driven) -> None:
    whole = engine.text(prompt(18), max_tokens=8)
    rest, nothing = engine.ask(*(request(prompt(18), whole[:done], max_tokens=8) for done in (5, 8)))
    assert (rest.tokens, rest.finish) == (whole[5:], "length")
    assert (nothing.tokens, nothing.finish) == ([], "length")


def test_the_context_ends_a_sequence(engine: Driven) -> None:
    (answer,) = engine.ask(request(prompt(engine.info.context - 3), max_tokens=50))
    assert (len(answer.tokens), answer.finish) == (3, "length")


def test_what_no_worker_of_the_model_could_run_is_invalid(engine: Driven) -> None:
    context = engine.info.context
    empty, full, longer = engine.ask(*(request(prompt(length), max_tokens=4) for length in (0, context, context + 1)))
    for answer in (empty, full, longer):
        assert (answer.tokens, answer.finish) == ([], "invalid")
        assert "prompt" in answer.detail
    assert str(context) in longer.detail


# ---- many, and those that are given up


def test_load_tells_running_and_queued(engine: Driven) -> None:
    places = engine.info.max_num_seqs
    many = [request(prompt(40, i), max_tokens=120) for i in range(places + 2)]
    engine.submit(*many)
    engine.until(lambda: engine.load.active_requests == places and engine.load.queued > 0, "full places and a queue")
    assert 0 < engine.load.active_blocks <= engine.load.kv_total
    assert [len(engine.answer(one).tokens) for one in many] == [120] * len(many)
    engine.nothing_is_used()


def test_an_aborted_sequence_ends_and_harms_no_other(engine: Driven) -> None:
    expected = engine.text(prompt(30, 5), max_tokens=100)
    other, running = request(prompt(30, 5), max_tokens=100), request(prompt(30, 6), max_tokens=900)
    waiting = [request(prompt(30, 7 + i), max_tokens=900) for i in range(engine.info.max_num_seqs)]
    engine.submit(running, other, *waiting)
    engine.begun(running, 3)
    engine.abort(running, *waiting)
    seen = {one.key: len(engine.answers[one.key].tokens) for one in (running, *waiting) if one.key in engine.answers}
    same_tokens(engine, other, expected, engine.answer(other).tokens)
    engine.nothing_is_used()
    told = {one.key: len(engine.answers[one.key].tokens) for one in (running, *waiting) if one.key in engine.answers}
    assert told == seen
    assert not any(engine.answers[key].finish for key in told)


def test_an_abort_right_behind_its_submit_wins(engine: Driven) -> None:
    never, steps = request(prompt(50, 3), max_tokens=900), engine.runner.steps
    engine.submit(never)
    engine.abort(never)
    engine.abort(request(prompt(5)))  # nobody knows this one
    engine.ask(request(prompt(9), max_tokens=3))
    engine.nothing_is_used()
    assert never.key not in engine.answers
    assert engine.runner.steps - steps < 100, "it ran, though nobody was told"
