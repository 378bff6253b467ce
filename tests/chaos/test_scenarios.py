"""Faults one at a time, on one cluster under load: what they may cost and what must be as before afterwards."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from chaos import wallclock
from chaos.answers import Question, answer_to
from chaos.client import Attempt, attempt
from chaos.cluster import PORT, Cluster, disagreements, wait_at_rest
from chaos.faults import Injector
from chaos.load import Load
from chaos.schedule import Fault
from netns.inside import thread_in
from support.nodes import wait_for

pytestmark = pytest.mark.alone

USERS = 8
SILENCE_S = 2.0
"""Longest that a stream may stand still when its worker freezes or is cut off."""
SPLIT_S = float(os.environ.get("P2PDYN_CHAOS_SPLIT_S", "10"))
"""How long the cluster stays in two halves."""
DEAD_S = 20.0
"""In which the halves have declared each other dead: slower than one crash, as who misses half of all doubts itself."""
CALM_S = 1.5

clocks = pytest.mark.skipif(bool(wallclock.missing()), reason=wallclock.missing())


def test_the_checker_tells_a_wrong_answer(cluster: Cluster) -> None:
    for stream in (True, False):
        question = Question(20, prompt="Who answers the phone at night?", stream=stream)
        right = answer_to(question)
        others = [replace(right, text=right.text[:-1] + "?"), replace(right, completion_tokens=19), right]
        with thread_in(cluster.client.space) as there:
            made = [there.submit(asyncio.run, attempt("f0", cluster.urls["f0"], question, one)) for one in others]
        assert [one.result().wrong for one in made] == [True, True, False]
        assert [one.result().right for one in made] == [False, False, True]


@contextmanager
def injector(cluster: Cluster) -> Iterator[Injector]:
    """The cluster is at rest before and after, nothing went wrong by the way, and all of it serves again."""
    assert wait_at_rest(cluster) == []
    injector = Injector(cluster)
    yield injector
    healed = max(trouble.ended for trouble in injector.troubles)
    assert injector.findings == []
    assert wait_at_rest(cluster, healed) == []
    with load(cluster) as calm:
        time.sleep(CALM_S)
    alive = {peer.node.id for peer in cluster.workers}
    assert undisturbed(calm.attempts) == []
    assert {worker for made in calm.attempts for worker in made.workers} <= alive


def load(cluster: Cluster, stick: bool = False) -> Load:
    return Load(cluster.client.space, cluster.urls, USERS, stick=stick)


def failed(attempts: list[Attempt]) -> list[str]:
    return [f"{made.frontend}: {made.why}" for made in attempts if not made.right]


def longest_silence(users: Load) -> float:
    """Of streams; the rest of the answers come at once."""
    return max(made.silence for one in users.asked if one.question.stream for made in one.attempts)


def undisturbed(attempts: list[Attempt]) -> list[str]:
    """What kept these attempts from being served at the first place that they went to."""
    moved = [f"{made.frontend}: moved to {made.workers}" for made in attempts if made.migrations]
    return failed(attempts) + moved + ([] if attempts else ["nothing was asked"])


@pytest.mark.parametrize("kind", ["stop", "deaf", "mute"])
def test_a_frozen_or_half_deaf_worker_costs_no_request_and_no_long_silence(cluster: Cluster, kind: str) -> None:
    with injector(cluster) as faults, load(cluster) as users:
        time.sleep(1.0)
        faults.run(Fault(0, kind, "w0", 3.0))
        time.sleep(1.0)
    assert failed(users.attempts) == []
    assert any(cluster.peers["w0"].node.id in made.workers for made in users.attempts)
    assert longest_silence(users) < SILENCE_S


def test_a_second_node_with_a_copied_data_dir_goes_and_disturbs_nobody(cluster: Cluster) -> None:
    holder = cluster.peers["w1"]
    with injector(cluster) as faults, load(cluster) as users:
        faults.run(Fault(0, "twin", "w1", 3.0))
        alarms = cluster.ask(holder, "peers")["alarms"]
    assert undisturbed(users.attempts) == []
    assert any(holder.node.id in alarm for alarm in alarms)


def test_a_full_disk_is_said_and_the_node_is_itself_again_when_there_is_room(cluster: Cluster) -> None:
    with injector(cluster) as faults, load(cluster) as users:
        faults.run(Fault(0, "disk", "w2", 2.0))
    assert failed(users.attempts) == []


def test_a_frontend_is_killed_and_its_clients_go_on_at_the_other(cluster: Cluster) -> None:
    with injector(cluster) as faults, load(cluster) as users:
        time.sleep(1.0)
        faults.run(Fault(0, "kill", "f0", 2.0))
    assert all(one.answered for one in users.asked)
    assert all(made.frontend == "f0" for made in users.attempts if not made.right)


def test_a_frozen_frontend_goes_on_with_its_streams(cluster: Cluster) -> None:
    with injector(cluster) as faults, load(cluster) as users:
        time.sleep(1.0)
        faults.run(Fault(0, "stop", "f0", 6.0))
        time.sleep(1.0)
    assert failed(users.attempts) == []


@clocks
@pytest.mark.parametrize("step", [7200.0, -7200.0])
def test_a_wall_clock_that_steps_moves_nothing(cluster: Cluster, step: float) -> None:
    with injector(cluster) as faults, load(cluster) as users, faults.on(Fault(0, "clock", "w3", 0, amount=step)):
        faults.run(Fault(0, "clock", "f1", 2.0, amount=step))
    assert undisturbed(users.attempts) == []


@clocks
def test_a_worker_restarts_while_its_clock_is_behind(cluster: Cluster) -> None:
    worker, seen = cluster.peers["w3"], cluster.peers["f0"]

    def epoch() -> int:
        return next(int(p["epoch"]) for p in cluster.ask(seen, "peers")["peers"] if p["name"] == "w3")

    before = epoch()
    with injector(cluster) as faults, faults.on(Fault(0, "clock", "w3", 0, amount=-7200.0)):
        faults.run(Fault(0, "kill", "w3", 0.5))
        wait_for(lambda: epoch() > before, 10, "its new life is the later one")
        assert worker.node.process.poll() is None


def test_a_slow_cable_is_slow_and_moves_nothing(cluster: Cluster) -> None:
    with injector(cluster) as faults, load(cluster) as users:
        with faults.on(Fault(0, "slow", "w0", 0, amount=100.0)):
            assert 0.2 < connecting_s(cluster, "w0") < 0.9
            time.sleep(2.0)
        assert connecting_s(cluster, "w0") < 0.1
    assert undisturbed(users.attempts) == []


CONNECT = """
import socket, sys, time
began = time.monotonic()
socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()
print(time.monotonic() - began)
"""


def connecting_s(cluster: Cluster, name: str) -> float:
    address = cluster.peers[name].host.address
    return float(cluster.client.run(sys.executable, "-c", CONNECT, address, str(PORT)))


def test_two_halves_serve_what_they_can_reach_and_become_one_again(cluster: Cluster) -> None:
    halves = {"f0": {"f0", "w0", "w1"}, "f1": {"f1", "w2", "w3"}}
    names = {peer.node.id: peer.name for peer in cluster.workers}
    gone = {"dead"} if SPLIT_S >= DEAD_S else {"suspect", "dead"}
    with injector(cluster) as faults, load(cluster, stick=True) as users:
        time.sleep(1.0)
        with faults.on(Fault(0, "split", "w0", 0, others=tuple(sorted(halves["f1"])))) as split:
            time.sleep(SPLIT_S)
            assert disagreements(cluster)
            for frontend, half in halves.items():
                states = {p["name"]: p["state"] for p in cluster.ask(cluster.peers[frontend], "peers")["peers"]}
                assert {name for name, state in states.items() if state == "ready"} == half
                assert {states[name] for name in states.keys() - half} <= gone
        time.sleep(1.0)
    assert failed(users.attempts) == []
    assert longest_silence(users) < SILENCE_S
    for frontend, half in halves.items():
        mine = [made for made in users.attempts if made.frontend == frontend]
        inside = [made for made in mine if split.began + SILENCE_S < made.began and made.ended < split.ended]
        assert inside
        assert {names[worker] for made in inside for worker in made.workers} <= half
