"""vLLM engines for all tests of this folder, and what they run in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from support import vllm_probe
from support.ahead import ahead, tiny
from support.vllm_engine import ENVIRONMENT, Lab

__all__ = ["ahead", "tiny"]


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the engines' connectors hold, by process group."""
    return tmp_path_factory.mktemp("probes")


@pytest.fixture(scope="session")
def lab(tiny: Path, probes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    environment = {
        **ENVIRONMENT,
        vllm_probe.FOLDER: str(probes),
        "PYTHONPATH": str(Path(vllm_probe.__file__).parents[1]),
        "UCX_TLS": "tcp,self",  # over shared memory the owner of what is read need not even run
    }
    with patch.dict(os.environ, environment), Lab(tmp_path_factory.mktemp("lab"), tiny) as made:
        yield made
