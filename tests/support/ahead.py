"""Engines take longer to load than most tests to run: what later tests need loads while the present ones run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import pytest

from support import tiny_llama
from support.vllm_engine import Lab


@dataclass
class Place:
    """What groups of engines begin from. ``ends`` runs when all tests are over."""

    folders: pytest.TempPathFactory
    lab: Lab
    ends: ExitStack = field(default_factory=ExitStack)


class Ahead:
    """One group of engines at a time. A test module's ``AHEAD`` maps the names of fixtures to what has the engines of
    each begin to load, without waiting for them: begun are those that ``items`` use, in the order of their first use.
    """

    def __init__(self, items: Iterable[pytest.Item], place: Place) -> None:
        self._place = place
        self._groups: dict[str, Callable[[Place], Any]] = {}
        self._begun: dict[str, Any] = {}
        for item in items:
            module: ModuleType | None = getattr(item, "module", None)
            known = getattr(module, "AHEAD", {})
            self._groups |= {name: known[name] for name in getattr(item, "fixturenames", ()) if name in known}

    def begun(self, name: str) -> Any:
        """What has begun for this fixture, now or earlier."""
        if name not in self._begun:
            self._begun[name] = self._groups[name](self._place)
        return self._begun[name]

    def loaded(self, name: str) -> None:
        """This group has loaded: the next one begins."""
        order = list(self._groups)
        for later in order[order.index(name) + 1 :][:1]:
            self.begun(later)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._place.ends.close()


# ---- fixtures for a conftest to import, beside the ``lab`` of its own engine


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model for all."""
    return tiny_llama.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def ahead(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead]:
    """Of all tests of the session that use this ``lab``."""
    with Ahead(request.session.items, Place(tmp_path_factory, lab)) as made:
        yield made
