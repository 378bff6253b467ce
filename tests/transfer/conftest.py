from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.kv_reader import BLOCKS, STRIDE, OwnerProcess


@pytest.fixture
def owners() -> Iterator[Callable[..., OwnerProcess]]:
    """``owners(kind, ...)`` starts a process that owns BLOCKS blocks."""
    made: list[OwnerProcess] = []

    def make(kind: str, **options: Any) -> OwnerProcess:
        options = {"name": f"owner-{len(made)}", "blocks": BLOCKS, "stride": STRIDE, **options}
        made.append(OwnerProcess(kind=kind, **options))
        return made[-1]

    yield make
    for owner in made:
        owner.end()
