"""The checker's answers are the engine's."""

from __future__ import annotations

import random

import pytest
from chaos.answers import Question, answer_to
from chaos.load import words
from support.engines import text

from p2pdyn.engines.base import EngineOptions
from p2pdyn.engines.sim import create


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 333])
def test_an_answer_is_what_a_fresh_engine_says(length: int, temperature: float) -> None:
    engine = create(EngineOptions(model=None, args=("--speedup=0",)))
    engine.load(lambda fraction, what: None)
    prompt = words(random.Random(length), length)
    question = Question(50, prompt=prompt, temperature=temperature, seed=length)
    right = answer_to(question)
    said = text(engine, list(prompt.encode()), max_tokens=50, temperature=temperature, seed=length)
    assert right.text == bytes(said).decode()
    assert (right.finish, right.prompt_tokens, right.completion_tokens) == ("length", length, 50)


def test_a_stop_string_ends_the_answer_before_it_and_is_counted() -> None:
    whole = answer_to(Question(50, prompt="Hello"))
    stop = whole.text[10:12]
    first = whole.text.index(stop)
    right = answer_to(Question(50, prompt="Hello", stop=stop))
    assert (right.text, right.finish, right.completion_tokens) == (whole.text[:first], "stop", first + 2)
