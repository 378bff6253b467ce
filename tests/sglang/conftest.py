"""One tiny model for all, what SGLang alone says of ten prompts, and engines that load ahead of their tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_llama
from support.ahead import Ahead, Place
from support.sglang_engine import ENVIRONMENT, Alone, Asked, make_lab, prompt
from support.vllm_engine import Lab

NEW_TOKENS = 64


PROMPTS = [prompt(length) for length in range(200, 2001, 200)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def lab(tiny: Path, environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = make_lab(tmp_path_factory.mktemp("lab"), tiny)
    yield made
    made.close()


@pytest.fixture(scope="session")
def reference_engine(
    request: pytest.FixtureRequest, tiny: Path, environment: None, tmp_path_factory: pytest.TempPathFactory
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


@pytest.fixture(scope="session")
def ahead(
    request: pytest.FixtureRequest,
    tiny: Path,
    lab: Lab,
    reference_engine: Asked | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ahead]:
    """The reference loads beside the first group."""
    with Ahead(request.session.items, Place(tiny, tmp_path_factory, lab)) as made:
        yield made
