"""The lab itself, with plain sockets and the mDNS introducer, before any node runs in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from netns.lab import TOOLS, Host, Lab, missing, run
from support.nodes import wait_for

SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 7400))
print("up", flush=True)
while True:
    server.accept()[0].close()
"""
CLIENT = "import socket,sys; socket.create_connection((sys.argv[1], 7400), timeout=1).close()"
HOLDER = """
import socket, time
held = socket.socket(type=socket.SOCK_DGRAM)
held.bind(("", 5353))
print("up", flush=True)
time.sleep(60)
"""
ANNOUNCE = textwrap.dedent("""
    import asyncio, sys
    from p2pdyn.net.interfaces import pick
    from p2pdyn.net.mdns import Mdns

    async def main(number):
        listen = pick(None)
        mdns = Mdns(node=f"{number:016x}", cluster="lab", name=f"host-{number}", port=7400, addresses=listen.hosts[:1],
                    key_fingerprint="k", interfaces=listen.interfaces,
                    on_peer=lambda address, txt: print(address, txt["name"], flush=True),
                    on_refused=print)
        await mdns.start()
        print("up", flush=True)
        await asyncio.sleep(60)

    asyncio.run(main(int(sys.argv[1])))
""")


def python(host: Host, code: str, *arguments: str) -> subprocess.Popen[str]:
    process = host.spawn(sys.executable, "-c", code, *arguments)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def reaches(host: Host, address: str) -> bool:
    command = [*host.prefix, sys.executable, "-c", CLIENT, address]
    return subprocess.run(command, capture_output=True, timeout=5).returncode == 0


def test_two_subnets_reach_each_other_only_through_the_router(lab: Lab) -> None:
    left, right = lab.switch("10.20.1"), lab.switch("10.20.2")
    a, b = lab.host("a", left, 1), lab.host("b", right, 1)
    router = lab.router(left, right)
    python(b, SERVER)
    assert not reaches(a, b.address)
    lab.route(a, right, "10.20.1.254")
    lab.route(b, left, "10.20.2.254")
    assert reaches(a, b.address)
    router.link("down")
    assert not reaches(a, b.address)
    router.link("up")
    wait_for(lambda: reaches(a, b.address), 5, "the route came back")
    assert "default" not in a.run("ip", "route")


def test_dropped_packets_and_a_pulled_cable_cut_a_host_off(lab: Lab) -> None:
    switch = lab.switch("10.20.1")
    a, b = lab.host("a", switch, 1), lab.host("b", switch, 2)
    python(b, SERVER)
    assert reaches(a, b.address)
    b.drop(a.address)
    assert not reaches(a, b.address)
    b.heal()
    assert reaches(a, b.address)
    a.link("down")
    assert not reaches(a, b.address)
    a.link("up")
    wait_for(lambda: reaches(a, b.address), 5, "the link came back")


def test_mdns_introduces_hosts_of_one_segment_and_again_after_the_cable_was_out(lab: Lab) -> None:
    switch = lab.switch("10.20.1")
    a, b = lab.host("a", switch, 1), lab.host("b", switch, 2)
    first = python(a, ANNOUNCE, "1")
    b.link("down")  # b starts while its cable is out: nothing to announce on
    second = python(b, ANNOUNCE.replace("pick(None)", "pick('eth0')"), "2")
    b.link("up")
    assert first.stdout is not None
    assert second.stdout is not None
    assert first.stdout.readline() == "10.20.1.2:7400 host-2\n"
    assert second.stdout.readline() == "10.20.1.1:7400 host-1\n"


def test_mdns_works_where_there_is_only_ipv6(lab: Lab) -> None:
    switch = lab.switch("10.20.1")
    hosts = lab.host("a", switch, 1), lab.host("b", switch, 2)
    for number, host in enumerate(hosts, 1):
        host.run("ip", "addr", "flush", "dev", "eth0", "scope", "global")
        host.run("ip", "addr", "add", f"fd00:20::{number}/64", "dev", "eth0", "nodad")
    first, second = python(hosts[0], ANNOUNCE, "1"), python(hosts[1], ANNOUNCE, "2")
    assert first.stdout is not None
    assert second.stdout is not None
    assert first.stdout.readline() == "[fd00:20::2]:7400 host-2\n"
    assert second.stdout.readline() == "[fd00:20::1]:7400 host-1\n"


def test_mdns_comes_back_once_its_port_is_free(lab: Lab) -> None:
    switch = lab.switch("10.20.1")
    a, b = lab.host("a", switch, 1), lab.host("b", switch, 2)
    holder = python(
        b,
        HOLDER,
    )
    impatient = ANNOUNCE.replace(
        "async def main", "from p2pdyn.net import mdns\nmdns.REQUERY_MIN_S = 0.5\n\nasync def main"
    )
    blocked, free = python(b, impatient, "2"), python(a, ANNOUNCE, "1")
    holder.kill()
    assert free.stdout is not None
    assert blocked.stdout is not None
    assert free.stdout.readline() == "10.20.1.2:7400 host-2\n"
    assert blocked.stdout.readline() == "10.20.1.1:7400 host-1\n"


def test_mdns_follows_an_interface_that_changes_its_address(lab: Lab) -> None:
    switch = lab.switch("10.20.1")
    a, b = lab.host("a", switch, 1), lab.host("b", switch, 2)
    moved = python(b, ANNOUNCE, "2")
    b.run("ip", "addr", "flush", "dev", "eth0", "scope", "global")
    b.run("ip", "addr", "add", "10.20.1.77/24", "dev", "eth0")
    wait_for(lambda: "10.20.1.77:5353" in b.run("ss", "-lun"), 5, "mDNS did not move to the new address")
    newcomer = python(a, ANNOUNCE, "1")
    assert newcomer.stdout is not None
    assert moved.stdout is not None
    assert newcomer.stdout.readline().endswith("host-2\n")
    assert moved.stdout.readline() == "10.20.1.1:7400 host-1\n"


def test_closing_kills_every_process_and_removes_every_namespace(tmp_path: Path, lab: Lab) -> None:
    inner = Lab(tmp_path)
    host = inner.host("x", inner.switch("10.20.9"), 1)
    process = python(host, SERVER)
    spaces = list(inner.spaces)
    inner.close()
    assert process.returncode == -9
    assert not set(spaces) & set(run("ip", "netns", "list").split())


def test_a_machine_that_lacks_a_tool_or_the_rights_is_told_so(
    tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing() == ""
    for tool in TOOLS:
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tmp_path))
    for tool, package in TOOLS.items():
        (tmp_path / tool).rename(tmp_path / "away")
        assert missing() == f"needs {tool} (apt-get install {package})"
        (tmp_path / "away").rename(tmp_path / tool)
    (tmp_path / "iptables").unlink()
    (tmp_path / "iptables").write_text("#!/bin/sh\necho 'Permission denied (you must be root)' >&2; exit 4\n")
    (tmp_path / "iptables").chmod(0o755)
    assert missing().endswith("Permission denied (you must be root)")
    assert "p2pdyn-probe" not in run("ip", "netns", "list")
    with monkeypatch.context() as unprivileged:
        unprivileged.setattr(os, "geteuid", lambda: 1000)
        assert missing() == "needs root to make network namespaces"
