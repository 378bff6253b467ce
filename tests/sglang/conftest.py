"""One tiny model for all, what SGLang alone says of ten prompts, and a laboratory of engines for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_llama
from support.sglang_engine import ENVIRONMENT, Alone, alone, make_lab, prompt
from support.vllm_engine import Lab

NEW_TOKENS = 64


PROMPTS = [prompt(length) for length in range(200, 2001, 200)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def references(tiny: Path) -> list[tuple[list[int], Alone]]:
    """Ten prompts of 200 to 2000 tokens and SGLang's own answers to them, greedy, in float32."""
    return list(zip(PROMPTS, alone(tiny, PROMPTS, NEW_TOKENS), strict=True))


@pytest.fixture(scope="module")
def lab(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = make_lab(tmp_path_factory.mktemp("lab"), tiny)
        yield made
        made.close()
