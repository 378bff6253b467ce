"""`p2pdyn doctor` against a real cluster: what is well, and the faults that keep hosts out of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from netns.examples import install, three_hosts, worker
from netns.lab import Host, Lab


def doctor(host: Host, *arguments: str) -> dict[str, Any]:
    command = [*host.prefix, sys.executable, "-m", "p2pdyn", "doctor", "--json", "--http", "127.0.0.1:0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1), done.stderr
    return report


def of(report: dict[str, Any], check: str) -> list[dict[str, str]]:
    return [finding for finding in report["findings"] if finding["check"] == check]


def test_a_healthy_cluster_and_a_host_about_to_join(lab: Lab) -> None:
    a, b, c = hosts = three_hosts(lab)
    install("mdns", *hosts)
    for host in (a, b):
        worker(host, "mdns").wait_ready()
    for host in (b, c):  # one with a running peer, one before its first start
        report = doctor(host, "--cluster-key", str(host.key), "--at", f"{a.address}:7400")
        assert report["ok"], report
        assert [f["level"] for f in of(report, "multicast")] == ["ok"]
        reach = [f["message"] for f in of(report, "reach")]
        assert len(reach) == (1 if host is b else 2)
        assert all("reach each other" in message for message in reach)
    held = [f["message"] for f in of(doctor(b), "ports")]
    assert sum("running p2pdyn" in message for message in held) >= 1


def test_a_firewall_in_one_direction(lab: Lab) -> None:
    a, b, c = hosts = three_hosts(lab)
    install("mdns", *hosts)
    for host in (a, b):
        worker(host, "mdns").wait_ready()
    c.run("iptables", "-A", "INPUT", "-p", "tcp", "--syn", "-j", "DROP")  # as many distributions come
    report = doctor(c, "--cluster-key", str(c.key), "--at", f"{a.address}:7400")
    assert not report["ok"]
    assert {f["level"] for f in of(report, "reach")} == {"fail"}
    for finding in of(report, "reach"):
        assert "cannot call back to 10.20.1.3:7400" in finding["message"]
        assert "open port 7400" in finding["mend"]


def test_the_wrong_key_and_a_dead_address(lab: Lab) -> None:
    a, b, _ = hosts = three_hosts(lab)
    install("mdns", *hosts)
    worker(a, "mdns").wait_ready()
    other = b.folder / "other.key"
    b.p2pdyn("keygen", str(other))
    for key in (("--cluster-key", str(other)), ()):
        (cluster,) = of(doctor(b, *key, "--at", f"{a.address}:7400"), "cluster")
        assert cluster["level"] == "fail"
        assert "--cluster-key" in cluster["mend"]
    report = doctor(b, "--at", "10.20.1.99:7400", "--seed", "10.20.1.98")
    assert [f["level"] for f in of(report, "cluster")] == ["fail"]
    assert [f["level"] for f in of(report, "seeds")] == ["warn"]


def test_multicast_that_is_blocked(lab: Lab) -> None:
    a = lab.host("a", lab.switch("10.20.1"), 1)
    a.run("iptables", "-A", "INPUT", "-d", "224.0.0.251", "-j", "DROP")
    (finding,) = of(doctor(a), "multicast")
    assert finding["level"] == "warn"
    assert "5353" in finding["mend"]
