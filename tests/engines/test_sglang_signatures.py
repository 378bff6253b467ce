"""The SGLang adapter against versions that no test here can run: it uses nothing that their sources lack."""

from __future__ import annotations

import json
import os
import tomllib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from support.engines import sequence

from p2pdyn.core.types import DECODE, PREFILL
from p2pdyn.engines import kv_wire
from p2pdyn.engines.base import BlocksRemoved, BlocksStored, EngineOptions
from p2pdyn.engines.sglang import arguments, handoff, sampling, versions
from p2pdyn.engines.sglang.engine import SglangEngine
from p2pdyn.engines.sglang.load import Loads

SIGNATURES = tomllib.loads((Path(__file__).parent / "sglang_signatures.toml").read_text())["versions"]
OLDEST = ".".join(map(str, versions.OLDEST))
EVERYTHING = {
    "max_tokens": 9,
    "temperature": 0.7,
    "min_tokens": 2,
    "logprobs": 3,
    "seed": 5,
    "lora": "adapter",
    "priority": 2,
}
GUIDED: list[dict[str, object] | None] = [
    None,
    {"json": "{}"},
    {"regex": "a"},
    {"grammar": 'root ::= "a"'},
    {"choice": ["a"]},
]


@pytest.fixture(params=SIGNATURES)
def names(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """What each class or function has, in the order of its source."""
    told = SIGNATURES[request.param]
    return {name: entry["names"].split() for name, entry in told.items() if name != "wheel"}


def test_the_oldest_version_is_among_them() -> None:
    assert OLDEST in SIGNATURES


@pytest.mark.parametrize("role", ["aggregated", PREFILL, DECODE])
def test_every_flag_of_ours_is_there(names: dict[str, list[str]], role: str) -> None:
    given = arguments._defaults(EngineOptions("m", role=role), 9001)
    ours = {flag[2:].replace("-", "_") for flag in given if flag.startswith("--")}
    assert len(ours) > 5
    assert ours <= set(names["ServerArgs"])


def test_the_events_configuration_has_no_other_keys(names: dict[str, list[str]], tmp_path: Path) -> None:
    flags = arguments._defaults(EngineOptions("m"), 0)
    parsed = Namespace(kv_events_config=flags[flags.index("--kv-events-config") + 1], dp_size=1)
    arguments._publish(parsed, tmp_path)
    assert set(json.loads(parsed.kv_events_config)) <= set(names["KVEventsConfig"])


@pytest.mark.parametrize("guided", GUIDED)
def test_every_sampling_parameter_is_there(names: dict[str, list[str]], guided: dict[str, object] | None) -> None:
    asked = sampling.to_sglang(sequence(1, [7] * 5, **EVERYTHING, guided=guided), 9, (258,), True)
    assert asked["sampling_seed"] == 5
    assert set(asked) <= set(names["SamplingParams"])


@pytest.mark.parametrize("remote", [b"", handoff.Room("h", 1, 2).pack()])
def test_every_argument_of_a_request_is_there(names: dict[str, list[str]], remote: bytes) -> None:
    takes = frozenset(names["async_generate"])
    engine = SglangEngine(EngineOptions("m"))
    try:
        engine._bridge = SimpleNamespace(takes=takes)  # type: ignore[assignment]
        engine._ranks, engine._priority, engine._traced, engine._loras = 2, 1, True, frozenset({"adapter"})
        asked = sequence(1, [7] * 5, **EVERYTHING)
        asked.remote, asked.traceparent = remote, "00-1-1-01"
        assert engine._refusal(asked) == ("", "")
        ask = engine._job(asked, 9).ask
        salted = sequence(2, [7] * 5, cache_salt="s")
        refused = engine._refusal(salted)[0]
    finally:
        os.close(engine.wakeup_fd)
    assert set(ask) | {"rid", "stream"} <= takes
    assert ("bootstrap_room" in ask) == bool(remote)
    assert refused == ("" if "cache_salt" in takes else "error"), "salted blocks would be shared"


def test_load_reads_nothing_else(names: dict[str, list[str]]) -> None:
    moving = SimpleNamespace(**dict.fromkeys(names["DisaggregationMetrics"], 1))
    one: Any = SimpleNamespace(**{**dict.fromkeys(names["LoadSnapshot"], 1), "disaggregation": moving})
    loads = Loads()
    assert loads.update([one])
    assert loads.load(16, 200, idle=False).active_requests == 2
    assert (loads.batch(), loads.settled) == (1, False)


def test_events_are_read_by_their_places(names: dict[str, list[str]]) -> None:
    told = {
        "block_hashes": [-5], "parent_block_hash": None, "token_ids": [1, 2, 3, 4], "block_size": 4, "lora_id": None,
        "medium": "GPU",
    }  # fmt: skip
    batch = [
        [1.0, [["BlockStored", *(told[name] for name in names["BlockStored"])]], 0],
        [2.0, [["BlockRemoved", *(told[name] for name in names["BlockRemoved"])]], 0],
    ]
    decoder = kv_wire.Decoder(4)
    stored, removed = (decoder.decode(msgpack.packb(one)).events[0] for one in batch)
    assert not decoder.dropped
    assert isinstance(stored, BlocksStored)
    assert isinstance(removed, BlocksRemoved)
    assert stored.tokens == (1, 2, 3, 4)
    assert stored.hashes == removed.hashes
