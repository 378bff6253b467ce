"""Three hosts, run from the very files of examples/multinode; only the engine is the simulated one."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from netns.examples import SIM, frontend, install, three_hosts, worker
from netns.lab import Host, Lab, Node
from support.nodes import wait_for

JOIN_S = 10.0
MERGE_S = 35.0
DEAD_S = 15.0


def all_see_all(*nodes: Node) -> bool:
    names = {node.host.name for node in nodes}
    return all(node.sees(*(names - {node.host.name})) for node in nodes)


ASK = """
import sys, time, urllib.request

body = b'{"model": "sim", "prompt": "%s", "max_tokens": 4}' % sys.argv[2].encode()
url, headers = "http://127.0.0.1:8000/v1/completions", {"content-type": "application/json"}
deadline = time.monotonic() + float(sys.argv[1])
while True:
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5)
        break
    except OSError as error:  # refused, or 404 and 503 until a worker is there
        if time.monotonic() > deadline or getattr(error, "code", 503) not in (404, 503):
            raise
        time.sleep(0.02)
print(time.monotonic(), answer.read().decode())
"""


def ask(host: Host, patience: float = 0.0, prompt: str = "Hello") -> tuple[float, dict[str, Any]]:
    """When a completion was first answered by the frontend on this host (monotonic clock), and the answer."""
    when, answer = host.run(sys.executable, "-c", ASK, str(patience), prompt).split(maxsplit=1)
    return float(when), json.loads(answer)


def answers(host: Host) -> bool:
    return bool(ask(host)[1]["choices"])


def test_three_hosts_joined_by_mdns_alone(lab: Lab) -> None:
    a, b, c = hosts = three_hosts(lab)
    install("mdns", *hosts)
    nodes = [frontend(a, "mdns"), worker(b, "mdns"), worker(c, "mdns")]
    for node in nodes:
        node.wait_ready()
    wait_for(lambda: all_see_all(*nodes), JOIN_S, "three hosts see each other")
    assert answers(a)
    report = nodes[0].report()
    assert {p["address"] for p in report["peers"]} == {f"{h.address}:7400" for h in hosts}


def test_containers_bridges_are_never_announced(lab: Lab) -> None:
    a, b, _ = hosts = three_hosts(lab)
    for host in (a, b):  # both have Docker's default network, as real hosts do
        host.run("ip", "link", "add", "docker0", "type", "bridge")
        host.run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "inside")
        host.run("ip", "link", "set", "veth0", "master", "docker0", "up")
        host.run("ip", "link", "set", "inside", "up")
        host.run("ip", "addr", "add", "172.17.0.1/16", "dev", "docker0")
        host.run("ip", "link", "set", "docker0", "up")
    install("mdns", *hosts)
    nodes = [worker(a, "mdns"), worker(b, "mdns")]
    for node in nodes:
        node.wait_ready()
    wait_for(lambda: all_see_all(*nodes), JOIN_S, "two hosts see each other")
    assert {p["address"] for p in nodes[0].report()["peers"]} == {"10.20.1.1:7400", "10.20.1.2:7400"}
    assert "172.17.0.1" not in a.run("ss", "-Hlnt")


@pytest.mark.alone
@pytest.mark.parametrize(("example", "promised_s"), [("mdns", 2.5), ("seeds", 1.0)])
def test_a_new_worker_takes_traffic_soon_after_ready(lab: Lab, example: str, promised_s: float) -> None:
    a, b, _ = hosts = three_hosts(lab)
    install(example, *hosts)
    frontend(a, example).wait_ready()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, a, 30.0)  # already asking when the worker starts
        late = worker(b, example).wait_ready()
        answered, _ = asking.result()
    assert answered - late.ready_at < promised_s, late.stderr


def test_three_hosts_on_two_subnets_joined_by_seeds_alone(lab: Lab) -> None:
    left, right = lab.switch("10.20.1"), lab.switch("10.20.2")
    a, b, c = hosts = (lab.host("a", left, 1), lab.host("b", left, 2), lab.host("c", right, 1))
    lab.router(left, right)
    for host in (a, b):
        lab.route(host, right, "10.20.1.254")
    lab.route(c, left, "10.20.2.254")
    install("seeds", *hosts)
    nodes = [frontend(a, "seeds"), worker(b, "seeds"), worker(c, "seeds")]
    for node in nodes:
        node.wait_ready()
    wait_for(lambda: all_see_all(*nodes), JOIN_S, "three hosts see each other")
    assert answers(a)
    assert not any("mDNS" in node.stderr for node in nodes)


def test_prefill_on_one_host_and_decode_on_another(lab: Lab) -> None:
    a, b, c = hosts = three_hosts(lab)
    install("prefill-decode", *hosts)
    prefill = worker(b, "prefill-decode", "prefill", "--prefill-tps 20000 --itl-ms 1")
    decode = worker(c, "prefill-decode", "decode", "--prefill-tps 500 --itl-ms 1")
    nodes = [frontend(a, "prefill-decode"), prefill, decode]
    for node in nodes:
        node.wait_ready()
    wait_for(lambda: all_see_all(*nodes), JOIN_S, "three hosts see each other")
    wait_for(lambda: decode.report()["transfers"]["owners"].get(prefill.id), JOIN_S, "the workers have met")
    assert ask(a, prompt="one two three four " * 80)[1]["p2pdyn"]["workers"] == [decode.id]
    assert decode.report()["transfers"]["outcomes"]["filled"] == 1


def test_a_peer_with_the_wrong_key_and_one_without_are_kept_out(lab: Lab) -> None:
    a, b, c = hosts = three_hosts(lab)
    install("mdns", *hosts)
    member = worker(a, "mdns").wait_ready()
    other = b.folder / "other.key"
    b.p2pdyn("keygen", str(other))
    flags = ("--engine", "none", "--no-http", "--cluster", "lab", "--seed", f"{a.address}:7400")
    wrong = b.node(*flags, "--cluster-key", str(other)).wait_ready()
    keyless = c.node(*flags, "--insecure").wait_ready()
    for refused in (wrong, keyless):
        wait_for(lambda node=refused: a.address in node.stderr, JOIN_S, f"{refused.host.name} names {a.address}")  # type: ignore[misc]
        line = next(line for line in refused.stderr.splitlines() if a.address in line and "key" in line)
        assert "--cluster-key" in line or "cluster key" in line
    wait_for(
        lambda: {b.address, c.address} <= refusals(member).keys(), JOIN_S, lambda: f"both counted: {refusals(member)}"
    )
    assert {p["id"] for p in member.report()["peers"]} == {member.id}


def refusals(node: Node) -> dict[str, int]:
    """How often each host was turned away."""
    return {address.rpartition(":")[0] or address: n for address, n in node.report()["refused"].items()}


def test_with_mdns_a_peer_with_another_key_and_the_cluster_name_each_other(lab: Lab) -> None:
    a, b, c = hosts = three_hosts(lab)
    install("mdns", *hosts)
    b.key = b.folder / "mdns" / "cluster.key"
    b.key.unlink()
    b.p2pdyn("keygen", str(b.key))
    first, second = worker(a, "mdns").wait_ready(), worker(b, "mdns").wait_ready()
    third = c.node("--config", f"{c.folder}/mdns/worker.toml", env={**SIM, "P2PDYN_INSECURE": "1"}).wait_ready()
    wait_for(lambda: all(f"{h.address}:7400" in first.stderr for h in (b, c)), JOIN_S, "the member names both")
    for refused in (second, third):
        wait_for(lambda node=refused: f"{a.address}:7400" in node.stderr, JOIN_S, "the refused names the member")  # type: ignore[misc]
        assert "--cluster-key" in refused.stderr
    assert first.states() == {}


def test_a_partition_heals(lab: Lab) -> None:
    a, b, c = hosts = three_hosts(lab)
    install("mdns", *hosts)
    nodes = one, two, three = [frontend(a, "mdns"), worker(b, "mdns"), worker(c, "mdns")]
    for node in nodes:
        node.wait_ready()
    wait_for(lambda: all_see_all(*nodes), JOIN_S, "three hosts see each other")
    c.drop(a.address, b.address)
    wait_for(lambda: one.states()["c"] == two.states()["c"] == "dead", DEAD_S, lambda: f"c is dead: {one.states()}")
    wait_for(lambda: three.states() == {"a": "dead", "b": "dead"}, DEAD_S, lambda: f"c's view: {three.states()}")
    assert two.states()["a"] == "ready"
    assert answers(a)
    c.heal()
    wait_for(lambda: all_see_all(*nodes), MERGE_S, lambda: f"the views agree: {[n.states() for n in nodes]}")


def test_kill_and_rejoin_under_the_same_id(lab: Lab) -> None:
    a, b, c = hosts = three_hosts(lab)
    install("mdns", *hosts)
    one, two, three = frontend(a, "mdns"), worker(b, "mdns"), worker(c, "mdns")
    for node in (one, two, three):
        node.wait_ready()
    wait_for(lambda: all_see_all(one, two, three), JOIN_S, "three hosts see each other")
    old = next(p for p in one.report()["peers"] if p["id"] == two.id)
    two.kill()
    again = worker(b, "mdns").wait_ready()
    assert again.id == two.id
    wait_for(lambda: all_see_all(one, again, three), JOIN_S, lambda: f"b is back: {one.states()}")
    new = [p for p in one.report()["peers"] if p["name"] == "b"]
    assert len(new) == 1
    assert new[0]["epoch"] > old["epoch"]
    assert answers(a)


def test_of_two_peers_with_one_id_the_newcomer_goes(lab: Lab) -> None:
    a, b, c = hosts = three_hosts(lab)
    install("mdns", *hosts)
    one, two = frontend(a, "mdns").wait_ready(), worker(b, "mdns").wait_ready()
    wait_for(lambda: all_see_all(one, two), JOIN_S, "two hosts see each other")
    copy = c.folder / "data"
    shutil.copytree(b.folder / "data", copy)
    newcomer = c.node("--config", f"{c.folder}/mdns/worker.toml", env=SIM, data=copy)
    assert newcomer.process.wait(JOIN_S) == 1
    newcomer.stop()
    assert "--data-dir" in newcomer.stderr
    assert b.address in newcomer.stderr
    assert c.address in newcomer.stderr
    wait_for(lambda: one.states() == {"b": "ready"}, JOIN_S, lambda: f"the older holder keeps the id: {one.states()}")
    assert two.process.poll() is None
    alarms = lambda: [text for text in two.report()["alarms"] if two.id in text]  # noqa: E731
    wait_for(alarms, JOIN_S, lambda: f"the older holder shows the alarm: {two.report()['alarms']}")
