"""A prefix on a worker that is busy: a less loaded one reads its KV blocks if that is faster than computing them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support import foreign_node
from support.nodes import Cluster, make_key, wait_for
from support.pd import Asked, PdCluster, prompt, reference

PREFIX = 4000
SLOW = ("--", "--prefill-tps", "2000", "--itl-ms", "1")
"""2 s for the prefix, to read it takes 20 ms."""
FAST = ("--", "--prefill-tps", "500000", "--itl-ms", "1", "--kv-bytes-per-block", "4096")
"""8 ms for the prefix; to read its megabyte takes 13 ms at the speed assumed."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, make_key(tmp_path)) as nodes:
        yield nodes


class Pair:
    """Two aggregated workers. The first has computed a prefix; :meth:`busy` gives it something else to do."""

    def __init__(self, cluster: Cluster, args: Sequence[str], mover: str, program: Sequence[str] | None = None) -> None:
        self.pd = pd = PdCluster(cluster, "sim", mover, always=False)
        self.owner = pd.start("owner", "aggregated", args=args, program=program)
        pd.ready()
        self.prefix, self.tail, self.fresh = prompt(PREFIX, 1), prompt(100, 2), 10
        pd.complete(self.prefix, 4)
        self.other = pd.start("other", "aggregated", args=args)
        pd.ready()
        wait_for(self._known, 10, "both workers' caches are known")

    def met(self) -> None:
        """A first prompt that would be worth a pull is computed all the same, but has the workers meet."""
        pd, first = self.pd, prompt(1000, 4)
        pd.complete(first, 4, headers={"x-p2pdyn-pin": self.owner.id})
        busy = self.busy(3000)
        pd.complete(first + self.tail, 4)
        wait_for(lambda: pd.transfers(self.other)["owners"].get(self.owner.id), 10, "the workers have met")
        assert busy.answer()

    def _known(self) -> bool:
        report = self.pd.frontend.peers(self.pd.cluster.key)
        return sum(peer["kv"]["stream"] == "EXACT" for peer in report["peers"]) == 2

    def busy(self, tokens: int) -> Asked:
        self.fresh += 1
        asked = Asked(self.pd, prompt(tokens, self.fresh), headers={"x-p2pdyn-pin": self.owner.id})
        wait_for(lambda: self.pd.transfers(self.owner)["active_requests"], 10, "the owner computes")
        return asked


def wanted(tmp_path: Path, pair: Pair, args: Sequence[str]) -> str:
    return reference(tmp_path / "reference", "sim", [pair.prefix + pair.tail], args=args)[0]


@pytest.mark.parametrize("mover", ["nixl", "tcp", "auto"])
def test_it_is_read_where_that_is_faster(cluster: Cluster, tmp_path: Path, mover: str) -> None:
    if mover == "nixl":
        pytest.importorskip("nixl", reason="nixl is not installed")
    pair = Pair(cluster, SLOW, mover)
    pair.met()
    pd = pair.pd
    busy = pair.busy(6000)
    text, answer = pd.complete(pair.prefix + pair.tail)
    assert answer["p2pdyn"]["workers"] == [pair.other.id]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == PREFIX
    report = pd.transfers(pair.other)
    assert report["outcomes"]["filled"] == 1, report
    assert report["blocks_filled"] == PREFIX // 16
    assert busy.answer()
    pd.all_given_back(pair.owner, pair.other)
    assert text == wanted(tmp_path, pair, SLOW)


@pytest.mark.alone
def test_it_is_computed_where_that_is_faster(cluster: Cluster, tmp_path: Path) -> None:
    pair = Pair(cluster, FAST, "tcp")
    pd = pair.pd
    text, answer = pd.complete(pair.prefix + pair.tail, headers={"x-p2pdyn-pin": pair.other.id})
    assert answer["p2pdyn"]["workers"] == [pair.other.id]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    report = pd.transfers(pair.other)
    assert not report["owners"], "nobody was to be read from"
    assert report["outcomes"] == {"filled": 0, "cached": 0, "cancelled": 0, "failed": 0}
    assert text == wanted(tmp_path, pair, FAST)


def test_it_is_refused_where_the_owners_chain_does_not_match(cluster: Cluster, tmp_path: Path) -> None:
    """The routing hashes agree, the keys do not: whatever the owner has there, it is not this prompt's."""
    pair = Pair(cluster, SLOW, "tcp", program=(sys.executable, foreign_node.__file__))
    pair.met()
    pd = pair.pd
    busy = pair.busy(6000)
    text, answer = pd.complete(pair.prefix + pair.tail)
    assert answer["p2pdyn"]["workers"] == [pair.other.id]
    report = pd.transfers(pair.other)
    assert report["failures"] == {"refused": 1}
    assert report["outcomes"]["filled"] == 0
    assert report["blocks_filled"] == 0
    assert busy.answer()
    pd.all_given_back(pair.owner, pair.other)
    assert text == wanted(tmp_path, pair, SLOW)
