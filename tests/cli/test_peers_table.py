from __future__ import annotations

from typing import Any

from p2pdyn.cli.peers import HEADER, table


def peer(**changes: Any) -> dict[str, Any]:
    load = {"active_requests": 3, "active_blocks": 9, "queued": 2, "kv_used": 25, "kv_total": 100}
    plain = {
        "id": "00112233aabbccdd",
        "name": "w1",
        "state": "ready",
        "detail": "",
        "progress": 1.0,
        "role": "aggregated",
        "engine": "vllm",
        "engine_version": "0.26.0",
        "models": ["sim"],
        "address": "10.0.0.1:7400",
        "last_seen_s": 0.25,
        "load": load,
    }
    return plain | changes


UNKNOWN = dict.fromkeys(("active_requests", "active_blocks", "queued", "kv_used", "kv_total"))


def test_each_peer_is_a_row_and_the_one_asked_is_marked() -> None:
    frontend = peer(id="f" * 16, name="f", role="frontend", engine="none", engine_version="", models=[], load=UNKNOWN)
    lines = table({"cluster": "lab", "self": "f" * 16, "peers": [frontend, peer()]})
    assert lines[0] == "cluster lab: 2 peers, 2 ready"
    assert lines[2].split() == list(HEADER)
    assert lines[3].split()[:1] == ["f*"]
    assert lines[3].split()[-3:] == ["-", "-", "0.2s"]
    assert (
        " ".join(lines[4].split()) == "w1 00112233aabbccdd ready aggregated vllm 0.26.0 sim 10.0.0.1:7400 3+2 25% 0.2s"
    )
    assert len(lines) == 5


def test_loading_shows_its_progress() -> None:
    [row] = table({"cluster": "c", "self": "", "peers": [peer(state="loading", progress=0.42)]})[3:]
    assert "loading 42%" in row


def test_what_is_wrong_is_told_below_in_full() -> None:
    report = {
        "cluster": "c",
        "self": "",
        "peers": [peer(state="incompatible", detail="block size 32, the cluster has 16")],
        "alarms": ["two live peers with id x: 10.0.0.1:7400 and 10.0.0.2:7400"],
    }
    assert table(report)[4:] == ["", "w1: block size 32, the cluster has 16", report["alarms"][0]]
    assert table(report, color=True)[3].startswith("\x1b[31m")
