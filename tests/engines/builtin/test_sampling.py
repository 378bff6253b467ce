"""What comes next: filters against a plain reading of their definitions, and the generator by position."""

from __future__ import annotations

import math
from array import array
from collections import Counter

import numpy as np
import pytest

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.builtin.sampling import choose, logprobs, uniform

LOGITS = np.array([0.0, 3.0, 1.0, 2.0, -1.0, 2.5, -4.0, 1.5], np.float32)
PROMPT = array("I", [6, 6, 4])


def draws(params: SamplingParams, count: int = 4000) -> Counter[int]:
    return Counter(choose(LOGITS, PROMPT, 3, params, (), seed) for seed in range(count))


def expected(keep: list[int], temperature: float = 1.0) -> dict[int, float]:
    weights = {token: math.exp(float(LOGITS[token]) / temperature) for token in keep}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


@pytest.mark.parametrize(
    ("params", "keep", "temperature"),
    [
        (SamplingParams(), list(range(8)), 1.0),
        (SamplingParams(temperature=2.0), list(range(8)), 2.0),
        (SamplingParams(top_k=3), [1, 5, 3], 1.0),
        (SamplingParams(top_k=100), list(range(8)), 1.0),
        (SamplingParams(top_p=0.7), [1, 5, 3], 1.0),
        (SamplingParams(top_p=0.0), [1], 1.0),
        (SamplingParams(min_p=0.3), [1, 5, 3], 1.0),
        (SamplingParams(top_k=3, top_p=0.7), [1, 5], 1.0),
    ],
)
def test_the_filters_leave_the_right_distribution(params: SamplingParams, keep: list[int], temperature: float) -> None:
    found = draws(params)
    wanted = expected(keep, temperature)

    assert set(found) <= set(keep)
    for token, probability in wanted.items():
        sigma = math.sqrt(4000 * probability * (1 - probability))
        assert abs(found[token] - 4000 * probability) <= 4.5 * sigma


def test_zero_temperature_takes_the_likeliest() -> None:
    assert choose(LOGITS, PROMPT, 3, SamplingParams(temperature=0.0), (), 1) == 1


def test_stops_are_impossible_before_min_tokens() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=1)
    assert choose(LOGITS, PROMPT, 3, params, (1, 5), 1) == 3
    assert choose(LOGITS, array("I", [6, 6, 4, 2]), 3, params, (1, 5), 1) == 1


@pytest.mark.parametrize(
    ("params", "tokens", "chosen"),
    [
        (SamplingParams(temperature=0.0, presence_penalty=1.0), [1], 5),
        (SamplingParams(temperature=0.0, presence_penalty=0.4), [1, 1, 1], 1),
        (SamplingParams(temperature=0.0, frequency_penalty=0.4), [1, 1, 1], 5),
        (SamplingParams(temperature=0.0, repetition_penalty=1.5), [1], 5),
        (SamplingParams(temperature=0.0, presence_penalty=-4.0), [0], 0),
    ],
)
def test_penalties(params: SamplingParams, tokens: list[int], chosen: int) -> None:
    assert choose(LOGITS, PROMPT + array("I", tokens), 3, params, (), 0) == chosen


def test_presence_counts_the_output_and_repetition_the_prompt_too() -> None:
    prompt = array("I", [1])
    assert choose(LOGITS, prompt, 1, SamplingParams(temperature=0.0, presence_penalty=2.0), (), 0) == 1
    assert choose(LOGITS, prompt, 1, SamplingParams(temperature=0.0, repetition_penalty=2.0), (), 0) == 5


def test_the_generator_is_a_function_of_seed_and_position() -> None:
    values = [uniform(seed, position) for seed in range(60) for position in range(60)]
    assert values[61] == uniform(1, 1)
    assert len(set(values)) == len(values)
    assert 0 <= min(values) < max(values) < 1
    assert abs(sum(values) / len(values) - 0.5) < 0.02
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_logprobs_are_the_models_own_and_sum_to_one() -> None:
    chosen, row = logprobs(LOGITS, 3, 8)
    assert [token for token, _ in row] == [1, 5, 3, 7, 2, 0, 4, 6]
    assert sum(math.exp(value) for _, value in row) == pytest.approx(1)
    assert chosen == dict(row)[3]
    assert logprobs(LOGITS, 6, 0)[1] == ()
    assert logprobs(LOGITS, 6, 2)[1] == row[:2]
