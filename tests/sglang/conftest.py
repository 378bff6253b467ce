"""SGLang engines for all tests of this folder, and what SGLang alone says of ten prompts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from support.ahead import ahead, tiny
from support.sglang_engine import ARGS, ENVIRONMENT, Alone, Asked, prompt
from support.vllm_engine import Lab

__all__ = ["ahead", "tiny"]

NEW_TOKENS = 64
PROMPTS = [prompt(length) for length in range(200, 2001, 200)]


@pytest.fixture(scope="session")
def lab(tiny: Path, reference_engine: Asked | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The reference loads beside the first group."""
    folder = tmp_path_factory.mktemp("lab")
    with patch.dict(os.environ, ENVIRONMENT), Lab(folder, tiny, "sglang", ARGS) as made:
        yield made


@pytest.fixture(scope="session")
def reference_engine(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Asked | None]:
    """What :func:`references` are asked of; nothing if no test wants them."""
    if not any("references" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    made = Asked(tmp_path_factory.mktemp("asked"), tiny, PROMPTS, NEW_TOKENS)
    yield made
    made.close()


@pytest.fixture(scope="session")
def references(reference_engine: Asked | None) -> list[tuple[list[int], Alone]]:
    """Ten prompts of 200 to 2000 tokens and SGLang's own answers to them, greedy, in float32."""
    assert reference_engine is not None
    return list(zip(PROMPTS, reference_engine.answers(), strict=True))
