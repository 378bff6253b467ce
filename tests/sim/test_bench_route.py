"""`p2pdyn bench route`: traces good and bad, and what the router promises on simulated workers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from p2pdyn.sim import route_trace
from p2pdyn.sim.bench_route import Replay, Setting, optimum, run, scale_of
from p2pdyn.sim.route_trace import BLOCK, SYNTHETIC, Request, TraceError, build
from p2pdyn.sim.route_worker import PrefixCache

FOUR = (5000.0,) * 4


def synthetic(name: str, count: int = 1000, seed: int = 7) -> list[Request]:
    return SYNTHETIC[name](random.Random(seed), count, 4.0)


def rows(trace: list[Request], policies: list[str], **setting: Any) -> dict[str, dict[str, Any]]:
    report = run(trace, policies, Setting(**{"tps": FOUR, **setting}))
    return {row["policy"]: row for row in report["policies"]}


# Traces.


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ({"input_length": 5, "hash_ids": []}, "timestamp"),
        ({"timestamp": float("nan"), "input_length": 5}, "timestamp"),
        ({"timestamp": 0, "hash_ids": []}, "input_length"),
        ({"timestamp": 0, "input_length": 0}, "input_length"),
        ({"timestamp": 0, "input_length": 5, "output_length": "many"}, "output_length"),
        ({"timestamp": 0, "input_length": 5, "hash_ids": [[]]}, "hash_ids"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, words: str) -> None:
    path = write(tmp_path / "t", {"timestamp": 0, "input_length": 5, "hash_ids": [1]}, line)
    with pytest.raises(TraceError, match=f"line 2 .*{words}"):
        route_trace.load(path)


def test_empty_or_without_extent_in_time_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="empty"):
        route_trace.load(write(tmp_path / "t"))
    with pytest.raises(TraceError, match="one timestamp"):
        scale_of(build([(5.0, 100, 1, [1]), (5.0, 100, 1, [2])]), Setting(FOUR))


def test_order_missing_answers_and_odd_ids_are_no_matter(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t",
        {"timestamp": 2000, "input_length": 3 * BLOCK, "hash_ids": [-7, "x", 5, 9]},
        "",
        {"timestamp": 1000, "input_length": 100, "output_length": 0, "hash_ids": [5]},
        {"timestamp": 1000, "input_length": 10 * BLOCK, "output_length": 3, "hash_ids": [-7, "x"]},
    )
    trace = route_trace.load(path)
    assert [request.at for request in trace] == [0, 0, 1]
    assert [request.output for request in trace] == [1, 3, 1]
    assert [len(request.blocks) for request in trace] == [1, 2, 3]
    assert trace[1].blocks == trace[2].blocks[:2]
    assert trace[0].blocks[0] not in trace[2].blocks


# The simulated cache.


def test_the_cache_evicts_ends_of_chains_first_and_never_what_is_held() -> None:
    cache = PrefixCache(4)
    assert cache.hold([1, 2, 3]) == ([1, 2, 3], [])
    assert cache.release([1, 2, 3]) == []
    assert cache.hold([1, 9, 8]) == ([9, 8], [3])
    assert cache.hold([7, 6]) == ([7, 6], [2])
    assert len(cache) == 5
    assert cache.release([1, 9, 8]) == [8]
    assert cache.hits([1, 9, 8]) == 2


# The replay.


def test_round_robins_utilisation_is_what_was_asked_for() -> None:
    trace = synthetic("unshared")
    for utilization in (0.5, 0.9):
        setting = Setting(FOUR, utilization=utilization)
        scale = scale_of(trace, setting)
        result = Replay(trace, scale, "round-robin", setting).run()
        assert sum(result.busy_s) / 4 / (trace[-1].at * scale) == pytest.approx(utilization, rel=1e-6)


def test_a_request_alone_takes_its_prefill() -> None:
    trace = build([(0.0, 10 * BLOCK, 5, list(range(10))), (1e6, 10 * BLOCK, 5, list(range(10)))])
    setting = Setting((5120.0,))
    result = Replay(trace, 1.0, "kv", setting).run()
    assert result.ttft == pytest.approx([1.0 + 0.004, 1 / 5120 + 0.004], rel=1e-3)
    assert result.hit_blocks == optimum(trace) == 10


def test_equal_seeds_are_equal_runs() -> None:
    trace = synthetic("conversations", 400)
    assert run(trace, ["kv", "random"], Setting(FOUR, 500)) == run(trace, ["kv", "random"], Setting(FOUR, 500))


@pytest.mark.parametrize(
    "trace",
    [
        build([(n * 100.0, 40, 1, [n]) for n in range(50)]),
        build([(n * 100.0, 20 * BLOCK, 30, list(range(20))) for n in range(50)]),
        build([(n // 10 * 1000.0, 300 * BLOCK, 3, list(range(n, n + 300))) for n in range(50)]),
        build([(n * 100.0, 10 * BLOCK, 1, []) for n in range(50)]),
    ],
    ids=["single blocks", "all the same", "larger than the cache", "no blocks known"],
)
def test_odd_traces_are_replayed(trace: list[Request]) -> None:
    for row in rows(trace, ["kv", "round-robin"], cache=16).values():
        assert 0 <= row["hit_ratio"] <= 1
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p90_ms"] <= row["ttft_p99_ms"]
        assert 1 <= row["imbalance"] <= 4


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize(("utilization", "cache"), [(0.5, inf), (0.9, 1500)])
def test_kv_is_never_worse_than_looking_at_load_or_at_nothing(name: str, utilization: float, cache: float) -> None:
    found = rows(synthetic(name), ["kv", "round-robin", "least-loaded"], utilization=utilization, cache=cache)
    kv = found.pop("kv")
    for other in found.values():
        assert kv["hit_blocks"] >= 0.98 * other["hit_blocks"]
        assert kv["ttft_p90_ms"] <= 1.03 * other["ttft_p90_ms"]
        assert kv["ttft_p99_ms"] <= 1.05 * other["ttft_p99_ms"]


def test_conversations_find_nearly_all_that_could_be_found() -> None:
    found = rows(synthetic("conversations"), ["kv"], utilization=0.9)["kv"]
    assert found["hit_ratio"] >= 0.95
    assert found["imbalance"] <= 1.25


def test_a_worker_four_times_slower_gets_about_a_fourth_of_the_load() -> None:
    trace = synthetic("unshared", 3000)
    setting = Setting((8000.0, 8000.0, 8000.0, 2000.0), utilization=0.35)
    result = Replay(trace, scale_of(trace, setting), "kv", setting).run()
    work = [busy * tps for busy, tps in zip(result.busy_s, setting.tps, strict=True)]
    assert 0.15 <= work[3] / mean(work[:3]) <= 0.35


@pytest.mark.parametrize("name", ["conversations", "unshared"])
def test_frontends_that_share_the_workers_do_not_herd(name: str) -> None:
    trace = synthetic(name, 2500)
    alone, *shared = [
        Replay(trace, scale_of(trace, setting), "kv", setting).run()
        for setting in [Setting(FOUR, utilization=0.75, frontends=frontends) for frontends in (1, 2, 4)]
    ]
    for result in shared:
        assert mean(result.ttft) <= 1.05 * mean(alone.ttft)
        assert result.hit_blocks >= 0.995 * alone.hit_blocks


def test_requests_of_one_tick_are_spread_so_that_frontends_hear_of_each_other() -> None:
    ticking = [replace(one, at=one.at // 10 * 10) for one in synthetic("conversations", 600)]
    spread = route_trace.spread(ticking, 10.0, random.Random(1))
    assert [one.at for one in spread] == sorted(one.at for one in spread)
    by_number = {tuple(one.blocks): one.at for one in ticking}
    assert all(0 <= one.at - by_number[tuple(one.blocks)] < 10 for one in spread)
    assert rows(ticking, ["kv"], frontends=4, spread_s=10.0)["kv"] == rows(spread, ["kv"], frontends=4)["kv"]
    waits = [rows(ticking, ["kv"], frontends=n, spread_s=s)["kv"]["ttft_p50_ms"] for n, s in ((4, 10.0), (4, 0.0))]
    assert waits[0] < waits[1]


# The command.


def test_the_command(tmp_path: Path) -> None:
    lines = [
        {"timestamp": n * 500, "input_length": 1500, "output_length": 9, "hash_ids": [n % 5, 10 + n % 5, 99 + n]}
        for n in range(60)
    ]
    command = [sys.executable, "-m", "p2pdyn", "bench", "route", "--workers", "3", "--cache-blocks", "40"]
    command += ["--prefill-tps", "5000", "--utilization", "0.5", "--trace", str(write(tmp_path / "t", *lines))]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True)
    report = json.loads(done.stdout)
    assert [row["policy"] for row in report["policies"]] == [
        "kv", "kv-dynamo", "round-robin", "random", "least-loaded", "power-of-two",
    ]  # fmt: skip
    assert set(report["policies"][0]) == {
        "policy", "hit_blocks", "optimum_blocks", "hit_ratio", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "imbalance",
    }  # fmt: skip
    assert done.stderr == ""
    done = subprocess.run([*command, "--policy", "kv"], capture_output=True, text=True, timeout=60, check=True)
    assert "round-robin's utilisation 0.5" in done.stdout
    bad = subprocess.run(
        [*command[:-1], str(write(tmp_path / "bad", "{}"))], capture_output=True, text=True, timeout=60
    )
    assert bad.returncode == 2
    assert bad.stderr.startswith("p2pdyn: line 1 of trace")
