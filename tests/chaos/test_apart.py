"""Faults while two workers prefill and two decode."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from chaos.cluster import Cluster, wait_at_rest
from chaos.faults import Injector
from chaos.load import Load
from chaos.schedule import Fault

pytestmark = pytest.mark.alone


@pytest.fixture
def cluster(hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("apart"), apart=True) as cluster:
        yield cluster


def filled(cluster: Cluster) -> int:
    """Prompts whose blocks came from another worker."""
    reports = [cluster.ask(peer, "peers")["transfers"] for peer in cluster.workers]
    return sum(report["outcomes"].get("filled", 0) for report in reports)


def test_prefill_workers_and_decode_workers_come_and_go(cluster: Cluster) -> None:
    assert wait_at_rest(cluster) == []
    faults = Injector(cluster)
    with Load(cluster.client.space, cluster.urls, 8) as users:
        time.sleep(1.0)
        assert filled(cluster) > 0
        for kind, victim in (("kill", "w0"), ("stop", "w2"), ("cut", "w1")):
            faults.run(Fault(0, kind, victim, 2.0))
            time.sleep(0.5)
    assert [made.why for made in users.attempts if not made.right] == []
    assert faults.findings == []
    assert wait_at_rest(cluster) == []
