"""Engines by name: ours, those of other distributions, and a factory's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pdyn.config import ConfigError, load
from p2pdyn.engines import registry
from p2pdyn.engines.base import EngineError, EngineOptions, EngineUsageError

EXAMPLE = Path(__file__).parents[2] / "examples" / "engine"


@pytest.fixture
def example_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves of a distribution with an engine."""
    folder = tmp_path / "toys-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[p2pdyn.engines]\nngram = ngram_engine:create\nbad = no factory\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("example_path")
def test_a_factory_s_place_is_an_engine_in_a_child() -> None:
    kind = registry.find("ngram_engine:create")
    assert (kind.module, kind.child) == ("ngram_engine:create", True)
    engine = registry.create(kind.module, EngineOptions())
    assert engine.load(lambda fraction, what: None).engine == "ngram"


@pytest.mark.usefixtures("distribution")
def test_an_entry_point_is_an_engine() -> None:
    assert registry.find("ngram").module == "ngram_engine:create"
    assert load({"engine": "ngram"}, {}).engine == "ngram"


@pytest.mark.usefixtures("distribution")
@pytest.mark.parametrize("name", ["nobody", "bad", "a b:c", "package.module:", ":factory", "x:" + "y" * 80])
def test_what_is_none_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(EngineError, match="use one of sim"):
        registry.find(name)
    with pytest.raises(ConfigError, match="--engine must be one of builtin, sim"):
        load({"engine": name}, {})


@pytest.mark.usefixtures("example_path")
@pytest.mark.parametrize(
    ("place", "named"), [("no_such_package.engine:create", "no_such"), ("ngram_engine:no", "'no'")]
)
def test_a_place_where_nothing_is_says_what_to_do(place: str, named: str) -> None:
    with pytest.raises(EngineUsageError, match=named) as refused:
        registry.create(place, EngineOptions())
    assert "PYTHONPATH" in str(refused.value)
