"""Small clusters through the accidents of docs/design/membership.md, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from p2pdyn.core.actions import Alarm, Fatal, MemberChanged
from p2pdyn.core.events import Announce, Leave, LinkDown, ProbeNow
from p2pdyn.core.types import DEAD, NodeId
from p2pdyn.sim.bench_membership import render, run
from p2pdyn.sim.cluster import Cluster, Node

LINKS = ("datagram", "tcp")
both_links = pytest.mark.parametrize("links", LINKS)


def start(nodes: int, links: str, loss: float = 0.0, seed: int = 3) -> Cluster:
    """A cluster that formed through one seed."""
    cluster = Cluster(nodes, seed=seed, links=links, loss=loss)
    for node in cluster.nodes[1:]:
        cluster.introduce(node, cluster.nodes[0])
    cluster.run_until(cluster.agreed, 30)
    cluster.run(5)
    return cluster


def dead_everywhere(cluster: Cluster, *gone: Node) -> Callable[[], bool]:
    return lambda: all(cluster.states(node).get(one.id) == DEAD for node in cluster.nodes if node.up for one in gone)


@both_links
@pytest.mark.parametrize("nodes", [2, 5, 20])
def test_forming_through_one_seed_is_quick(nodes: int, links: str) -> None:
    cluster = Cluster(nodes, seed=5, links=links)
    for node in cluster.nodes[1:]:
        cluster.introduce(node, cluster.nodes[0])
    assert cluster.run_until(cluster.agreed, 10) <= 2.0


@both_links
def test_a_late_joiner_is_known_to_all_within_a_second(links: str) -> None:
    cluster = start(10, links)
    newcomer = cluster.add(10)
    cluster.introduce(newcomer, cluster.nodes[0])
    assert cluster.run_until(cluster.agreed, 5) <= 1.0


@both_links
def test_changed_info_reaches_all_at_once(links: str) -> None:
    cluster = start(20, links)
    one = cluster.nodes[7]
    cluster.event(one, Announce(b"ready"))
    assert cluster.run_until(lambda: all(n.core.members[one.id].info == b"ready" for n in cluster.nodes), 2) <= 0.2


@both_links
@pytest.mark.parametrize("nodes", [2, 3, 8, 32])
def test_a_dead_host_is_dead_to_all_within_six_seconds(nodes: int, links: str) -> None:
    cluster = start(nodes, links)
    victim = cluster.nodes[-1]
    cluster.crash(victim)
    assert cluster.run_until(dead_everywhere(cluster, victim), 10) <= 6.0
    cluster.restart(victim, cluster.nodes[0])
    assert cluster.run_until(cluster.agreed, 10) <= 0.5


@both_links
def test_a_killed_process_is_probed_at_once(links: str) -> None:
    cluster = start(8, links)
    victim = cluster.nodes[-1]
    cluster.crash(victim, host_too=False)
    if links == "datagram":
        cluster.event(cluster.nodes[0], ProbeNow(victim.id))
    assert cluster.run_until(dead_everywhere(cluster, victim), 10) <= 4.9


@both_links
def test_leaving_is_known_at_once_and_is_no_death(links: str) -> None:
    seen: list[str] = []
    cluster = start(20, links)
    cluster._on_change = lambda node, change: seen.append(change.member.state)
    cluster.event(cluster.nodes[4], Leave())
    cluster.run(0.5)
    cluster.crash(cluster.nodes[4])
    cluster.run(20)
    assert {cluster.states(node)[cluster.nodes[4].id] for node in cluster.nodes if node.up} == {"left"}
    assert set(seen) == {"left"}


@both_links
@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_a_partition_heals(links: str, loss: float) -> None:
    cluster = start(6, links, loss)
    one, other = set(range(3)), set(range(3, 6))
    cluster.network.cuts.partition(one, other)
    cluster.run_until(dead_everywhere_across(cluster, one, other), 60)
    cluster.run(120)
    cluster.network.cuts.heal()
    assert cluster.run_until(cluster.agreed, 60) <= 35.0


def dead_everywhere_across(cluster: Cluster, one: set[int], other: set[int]) -> Callable[[], bool]:
    def check() -> bool:
        pairs = [(a, b) for a in one for b in other]
        return all(
            cluster.states(cluster.nodes[a])[cluster.nodes[b].id] == DEAD
            and cluster.states(cluster.nodes[b])[cluster.nodes[a].id] == DEAD
            for a, b in pairs
        )

    return check


@both_links
def test_a_large_partition_heals_without_seeds(links: str) -> None:
    cluster = Cluster(60, seed=9, links=links, joined=True)
    cluster.run(5)
    cluster.network.cuts.partition(set(range(30)), set(range(30, 60)))
    cluster.run(60)
    cluster.network.cuts.heal()
    assert cluster.run_until(cluster.agreed, 60) <= 35.0


@both_links
def test_everybody_restarts_at_once(links: str) -> None:
    """memberlist#311: the incarnations of the former life are high, and must not win."""
    cluster = start(12, links)
    for _ in range(20):
        cluster.event(cluster.nodes[3], Announce(b"again"))
    cluster.run(1)
    for node in cluster.nodes:
        cluster.crash(node, host_too=False)
    for node in cluster.nodes:
        cluster.restart(node, cluster.nodes[0])
    assert cluster.run_until(cluster.agreed, 30) <= 10.0
    assert all(m.version.incarnation < 20 for node in cluster.nodes for m in node.core.members.values())


@both_links
def test_one_way_loss_between_two_kills_nobody(links: str) -> None:
    deaths: list[NodeId] = []
    cluster = start(6, links)
    cluster._on_change = lambda node, change: deaths.append(change.member.id) if change.member.state == DEAD else None
    cluster.network.cuts.cut(1, 4)
    cluster.run(120)
    assert deaths == []
    assert cluster.agreed()


@both_links
def test_a_node_that_nobody_hears_is_dead_and_comes_back(links: str) -> None:
    cluster = start(6, links)
    deaf = cluster.nodes[5]
    for index in range(5):
        cluster.network.cuts.cut(5, index)
    cluster.run_until(lambda: all(cluster.states(n)[deaf.id] == DEAD for n in cluster.nodes[:5]), 20)
    cluster.network.cuts.heal()
    assert cluster.run_until(cluster.agreed, 60) <= 35.0


@both_links
def test_sigstop_and_resume(links: str) -> None:
    """The stopped one is declared dead; what it wakes up to must not make it accuse anybody."""
    accused: list[tuple[int, NodeId]] = []
    cluster = start(8, links)
    sleeper = cluster.nodes[2]

    def watch(node: Node, change: MemberChanged) -> None:
        if change.member.state != "alive" and change.member.id != sleeper.id:
            accused.append((node.index, change.member.id))

    cluster._on_change = watch
    cluster.pause(sleeper)
    cluster.run_until(lambda: all(cluster.states(n)[sleeper.id] == DEAD for n in cluster.nodes if n is not sleeper), 10)
    cluster.run(60)
    cluster.resume(sleeper)
    assert cluster.run_until(cluster.agreed, 40) <= 35.0
    cluster.run(20)
    assert accused == []


@both_links
def test_short_stalls_of_everybody_kill_nobody(links: str) -> None:
    """A host at 100 % CPU: each process stands still for up to a second, again and again."""
    deaths: list[NodeId] = []
    cluster = start(10, links)
    cluster._on_change = lambda node, change: deaths.append(change.member.id) if change.member.state == DEAD else None
    rng = random.Random(4)
    for _ in range(120):
        stalled = rng.sample(cluster.nodes, 5)
        for node in stalled:
            cluster.pause(node)
        cluster.run(rng.uniform(0.2, 1.0))
        for node in stalled:
            cluster.resume(node)
        cluster.run(rng.uniform(0.0, 0.1))
    assert deaths == []


@both_links
def test_a_node_cut_off_doubts_itself_first(links: str) -> None:
    cluster = start(8, links)
    lonely = cluster.nodes[0]
    cluster.network.cuts.partition({0}, set(range(1, 8)))
    cluster.run(12)
    assert DEAD not in cluster.states(lonely).values()
    assert [a.kind for a in lonely.others if isinstance(a, Alarm)] == ["isolated"]
    cluster.network.cuts.heal()
    assert cluster.run_until(cluster.agreed, 60) <= 35.0
    assert not [a for node in cluster.nodes[1:] for a in node.others]


@both_links
@pytest.mark.parametrize("through", [0, 3])
def test_a_cloned_data_dir(links: str, through: int) -> None:
    """Node 3 runs; its clone comes up elsewhere, introduced by another or by node 3 itself: it stops, node 3 stays."""
    cluster = start(6, links)
    cluster.run(10)
    keeper = cluster.nodes[3]
    clone = cluster.add(6, keeper.id)
    cluster.introduce(clone, cluster.nodes[through])
    cluster.run(10)
    assert [a for a in clone.others if isinstance(a, Fatal)]
    assert [a.kind for a in keeper.others if isinstance(a, Alarm)] == ["duplicate-id"]
    cluster.crash(clone)
    cluster.run(20)
    others = [node for node in cluster.nodes if node is not clone]
    assert {node.core.members[keeper.id].address for node in others} == {keeper.address}
    assert {node.core.members[keeper.id].state for node in others} == {"alive"}


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = (run(20, 0.1, "tcp", seed=6, seconds=60, progress=lambda _: None) for _ in range(2))
    del first["cpu_s"], second["cpu_s"]
    assert first == second


@both_links
def test_a_hundred_nodes_at_ten_percent_loss(links: str) -> None:
    result = run(100, 0.1, links, seed=2, seconds=60.0, crash_every_s=8.0, progress=lambda _: None)
    assert result["pairs"] >= 90
    assert result["missed"] == 0
    assert result["detect_p99_s"] <= 10.0
    assert result["false_deaths"] == 0
    assert result["bytes_per_s_mean"] <= 4_000
    assert result["bytes_per_s_max"] <= 10_000
    assert sum(result["bytes_per_s_by_kind"].values()) == pytest.approx(result["bytes_per_s_mean"], abs=1)
    assert "false deaths 0" in render(result)


def test_link_down_of_a_stranger_is_nothing() -> None:
    cluster = start(2, "tcp")
    cluster.event(cluster.nodes[0], LinkDown(cluster.add(2).address))
    cluster.run(1)
    assert {state for node in cluster.nodes[:2] for state in cluster.states(node).values()} == {"alive"}
