from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from netns.lab import Lab, missing

HERE = Path(__file__).parent

_why_not = cache(missing)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.netns)
            item.add_marker(pytest.mark.timeout(180))  # a partition alone may take 35 s to heal


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    if why := _why_not():
        pytest.skip(why)
    with Lab(tmp_path) as lab:
        yield lab
