from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil
import pytest
from chaos import wallclock
from chaos.cluster import Cluster
from netns.lab import missing
from support.nodes import wait_for

HERE = Path(__file__).parent

_why_not = cache(missing)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.netns)
            item.add_marker(pytest.mark.timeout(240))


@pytest.fixture(scope="module")
def hosts() -> None:
    if why := _why_not():
        pytest.skip(why)


@pytest.fixture(scope="module")
def cluster(hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all scenarios: each begins and leaves it at rest. Without a compiler, clocks cannot be stepped."""
    folder = tmp_path_factory.mktemp("chaos")
    with Cluster(folder, None if wallclock.missing() else wallclock.build(folder)) as cluster:
        yield cluster


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind() -> Iterator[None]:
    """For the module as a whole: a scenario may leave the cluster with other processes than it found."""
    threads, children = set(threading.enumerate()), set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= children
    wait_for(lambda: set(threading.enumerate()) <= threads, 3, lambda: f"threads end: {threading.enumerate()}")
