"""Who watches whom in a large cluster."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from support.membership import Peer, address, node_id, sent

from p2pdyn.core.membership_rings import Rings
from p2pdyn.core.types import NodeId
from p2pdyn.wire.control import Gossip, Ping, PingReq

RINGS = 8


def rings_of(nodes: list[NodeId]) -> dict[NodeId, Rings]:
    made = {}
    for node in nodes:
        made[node] = Rings(node, RINGS)
        for other in nodes:
            if other != node:
                made[node].joined(other)
    return made


def test_each_has_one_watcher_and_one_subject_a_ring() -> None:
    rng = random.Random(1)
    nodes = [NodeId(f"{rng.getrandbits(64):016x}") for _ in range(100)]
    rings = rings_of(nodes)
    for ring in range(RINGS):
        place = nodes[0]
        tour = [place := rings[place].successor(ring) or place for _ in nodes]
        assert sorted(tour) == sorted(nodes)


def test_news_told_once_to_each_subject_floods_the_cluster() -> None:
    """Also when one node in ten is dead and not known to be."""
    rng = random.Random(2)
    nodes = [NodeId(f"{rng.getrandbits(64):016x}") for _ in range(400)]
    rings, dead = rings_of(nodes), set(nodes[360:])
    heard, edge, steps = {nodes[0]}, {nodes[0]}, 0
    while edge:
        edge = {subject for node in edge for subject in rings[node].subjects()} - heard - dead
        heard |= edge
        steps += bool(edge)
    assert heard == set(nodes) - dead
    assert steps <= 6


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=60))
def test_successors_are_those_of_the_members_whatever_came_before(steps: list[tuple[bool, int]]) -> None:
    rings, members = Rings(node_id(0), RINGS), set[NodeId]()
    for joins, index in steps:
        node = node_id(index)
        if joins and node not in members:
            members.add(node)
            rings.joined(node)
        elif not joins and node in members:
            members.discard(node)
            rings.gone(node, members)
        fresh = Rings(node_id(0), RINGS)
        for member in sorted(members):
            fresh.joined(member)
        assert [rings.successor(ring) for ring in range(RINGS)] == [fresh.successor(ring) for ring in range(RINGS)]
        assert set(rings.subjects()) <= members
        assert bool(rings.subjects()) == bool(members)


def test_subjects_are_probed_at_even_distances_and_others_now_and_then() -> None:
    peer = Peer(100)
    subjects = set(peer.core._context.roster.rings.subjects())
    turns = 4 * (RINGS + 1)
    pings = sent(peer.run(turns * peer.config.probe_large_s, answering=range(1, 101)), Ping)
    count = Counter(ping.target for _, ping in pings)
    assert {count[subject] for subject in subjects} <= {4, 5}
    assert 3 <= len(set(count) - subjects) <= 4 + 4 * (RINGS - len(subjects))


def test_news_and_questions_go_to_the_subjects() -> None:
    peer = Peer(100)
    subjects = peer.core._context.roster.rings.subjects()
    peer.run(3.0)
    assert {to for to, _ in sent(peer.actions, PingReq)} <= {peer.core.members[node].address for node in subjects}
    accusations = sent(peer.actions, Gossip)
    accused = {address(int(record.id, 16)) for _, gossip in accusations for record in gossip.updates}
    assert {to for to, _ in accusations} <= {peer.core.members[node].address for node in subjects} | accused
    assert accused
