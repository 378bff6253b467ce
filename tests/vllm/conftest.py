"""One tiny model for all, and engines that load ahead of their tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_llama, vllm_probe
from support.ahead import Ahead, Place
from support.vllm_engine import ENVIRONMENT, Lab


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the engines' connectors hold, by process group."""
    return tmp_path_factory.mktemp("probes")


@pytest.fixture(scope="session")
def environment(probes: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv(vllm_probe.FOLDER, str(probes))
        patch.setenv("PYTHONPATH", str(Path(vllm_probe.__file__).parents[1]))
        patch.setenv("UCX_TLS", "tcp,self")  # over shared memory the owner of what is read need not even run
        yield


@pytest.fixture(scope="session")
def lab(tiny: Path, environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"), tiny)
    yield made
    made.close()


@pytest.fixture(scope="session")
def ahead(
    request: pytest.FixtureRequest, tiny: Path, lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ahead]:
    with Ahead(request.session.items, Place(tiny, tmp_path_factory, lab)) as made:
        yield made
