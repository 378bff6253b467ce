"""One tiny model for all, and laboratories of engines for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_llama
from support.vllm_engine import ENVIRONMENT, Lab


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def lab(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = Lab(tmp_path_factory.mktemp("lab"), tiny)
        yield made
        made.close()
