"""The parts of the SGLang adapter that need no SGLang."""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from support.engines import sequence

from p2pdyn.core.types import DECODE, PREFILL
from p2pdyn.engines.base import EngineOptions, EngineUsageError, Output
from p2pdyn.engines.sglang import arguments, handoff, sampling, versions
from p2pdyn.engines.sglang.engine import ERROR, STAGES, VAGUE, SglangEngine
from p2pdyn.engines.sglang.load import Loads
from p2pdyn.engines.vllm import sampling as vllm_sampling


def test_versions_are_judged(caplog: pytest.LogCaptureFixture) -> None:
    for fine in ("0.5.17", "0.5.23", "0.5.20.post1"):
        versions.judge(fine)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        versions.judge("0.6.0")
        versions.judge("dev")
    assert len(caplog.records) == 2
    with pytest.raises(EngineUsageError, match=r"sglang 0\.5\.9 is too old: versions 0\.5\.17 to 0\.5\.23"):
        versions.judge("0.5.9")


def test_one_that_goes_by_seeds_honours_what_vllm_does() -> None:
    """So that workers of both may serve one model: examples/multinode/mixed says how."""
    assert {*sampling.ALWAYS, *sampling.WITH_TOKENIZER, "seed"} == {*vllm_sampling.FEATURES, "guided"}


def test_without_sglang_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(EngineUsageError, match="pip install"):
        versions.installed()


def to_sglang(params: dict[str, Any], room: int = 9, output: int = 0, seeded: bool = False) -> dict[str, Any]:
    return sampling.to_sglang(sequence(1, [7] * 5, [8] * output, **params), room, (258,), seeded)


def test_sampling_parameters_are_sglangs_one_to_one() -> None:
    asked = to_sglang(
        {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "stop_token_ids": (3, 4),
            "min_tokens": 2,
        }
    )
    assert asked == {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "stop_token_ids": [3, 4, 258],
        "ignore_eos": False,
        "skip_special_tokens": False,
    }


def test_what_sglang_spells_otherwise() -> None:
    plain = to_sglang({"ignore_eos": True, "top_p": 0.0, "seed": 5, "min_tokens": 6}, output=4)
    assert (plain["top_k"], plain["top_p"], plain["stop_token_ids"]) == (-1, 1e-6, [])
    assert plain["min_new_tokens"] == 2, "counted from the prompt, of which four were produced before"
    assert "sampling_seed" not in plain
    assert to_sglang({"seed": 5}, seeded=True)["sampling_seed"] == 5
    assert to_sglang({"min_tokens": 50})["min_new_tokens"] == 9


@pytest.mark.parametrize(
    ("guided", "asked"),
    [
        ({"json": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"json": '{"type":"object"}'}, {"json_schema": '{"type":"object"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"grammar": 'root ::= "a"'}, {"ebnf": 'root ::= "a"'}),
        ({"choice": ["a", 'b"\\']}, {"ebnf": 'root ::= "a" | "b\\"\\\\"'}),
    ],
)
def test_guided_decoding_has_sglangs_names(guided: dict[str, object], asked: dict[str, str]) -> None:
    assert to_sglang({"guided": guided}).items() >= asked.items()


@pytest.mark.parametrize("guided", [{"shape": "round"}, {"regex": "a", "json": {}}, {}])
def test_guided_decoding_that_sglang_lacks_is_refused(guided: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="guided decoding"):
        to_sglang({"guided": guided})


def chunk(ids: list[int], ended: dict[str, Any] | None = None, **meta: Any) -> dict[str, Any]:
    return {"output_ids": ids, "meta_info": {"finish_reason": ended, **meta}}


def test_chunks_become_outputs() -> None:
    assert sampling.from_sglang(3, chunk([5], cached_tokens=32), True, None) == Output(3, (5,), cached=32)
    assert sampling.from_sglang(3, chunk([5], cached_tokens=32), False, None) == Output(3, (5,))
    assert sampling.from_sglang(3, chunk([5, 6], {"type": "stop", "matched": 6}), False, None).finish == "stop"
    aborted = sampling.from_sglang(3, chunk([5], {"type": "abort", "message": "no\nroom"}), False, None)
    assert aborted == Output(3, (), "error", detail="no"), "its token was told before"
    refused = {"type": "abort", "message": "no grammar", "status_code": 400}
    assert sampling.from_sglang(3, chunk([], refused), True, None) == Output(3, (), "invalid", detail="no grammar")
    assert sampling.from_sglang(3, chunk([], refused), False, None).finish == "error", "it has begun: no refusal"
    assert sampling.from_sglang(3, chunk([], {**refused, "status_code": 500}), True, None).finish == "error"
    told = {
        "output_token_logprobs": [(-9.0, 1, None), (-0.1, 5, None)],
        "output_top_logprobs": [[], [(-0.1, 5, None), (-2.0, 6, None)]],
    }
    assert sampling.from_sglang(3, chunk([5], **told), False, 1).logprobs == ((-0.1, ((5, -0.1),)),)
    assert sampling.from_sglang(3, chunk([5], **told), False, 0).logprobs == ((-0.1, ()),)


def test_stop_tokens_that_sglang_ignores_are_looked_for_here() -> None:
    stops = sampling.watched(sequence(1, [1], stop_token_ids=(7,), ignore_eos=True).params)
    assert stops == {7}
    assert not sampling.watched(sequence(1, [1], stop_token_ids=(7,)).params)
    assert sampling.cut(Output(1, (5, 7, 8)), stops) == Output(1, (5, 7), "stop")
    assert sampling.cut(Output(1, (5, 8)), stops) == Output(1, (5, 8))


def test_a_room_is_what_both_sides_are_told() -> None:
    room = handoff.opened("10.0.0.1", 8998)
    assert handoff.unpack(room.pack()) == room
    assert room.arguments() == {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": room.room}
    rooms = {handoff.opened("h", 1).room for _ in range(100)}
    assert len(rooms) == 100
    assert all(0 <= one < 2**63 for one in rooms)


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb({"bootstrap_host": "", "bootstrap_port": 1, "room": 1}),
        msgpack.packb({"bootstrap_host": "h", "bootstrap_port": 0, "room": 1}),
        msgpack.packb({"bootstrap_host": "h", "bootstrap_port": 1, "room": -1}),
        b"x" * 2000,
    ],
)
def test_what_is_no_room_is_refused(wrong: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        handoff.unpack(wrong)


def flags(*args: str, role: str = "aggregated") -> list[str]:
    options = EngineOptions("m", role=role, args=args)
    return arguments._defaults(options, 9001)


def test_user_flags_win_over_defaults() -> None:
    plain = flags()
    assert plain[:2] == ["--model-path", "m"]
    assert plain[plain.index("--page-size") + 1] == "16"
    assert "--device" not in plain
    assert "--disaggregation-mode" not in plain
    given = flags("--page_size=32", "--model", "n", "--host", "1.2.3.4")
    assert not {"--page-size", "--model-path", "--host"} & set(given)
    assert "--kv-events-config" not in flags("--disable-radix-cache")


def test_the_shim_and_roles_bring_flags_of_their_own() -> None:
    shimmed = flags(arguments.CPU_SHIM, "--attention-backend", "other", role=DECODE)
    assert shimmed[shimmed.index("--device") + 1] == "cpu"
    assert "--attention-backend" not in shimmed
    assert "--sleep-on-idle" in shimmed
    assert "--sleep-on-idle" not in flags(role=PREFILL), "beside a GPU there are cores enough"
    assert shimmed[shimmed.index("--disaggregation-mode") + 1] == DECODE
    assert "none" in shimmed, "nothing is pinned for CUDA"
    prefill = flags(role=PREFILL)
    assert prefill[prefill.index("--disaggregation-bootstrap-port") + 1] == "9001"
    assert prefill[prefill.index("--disaggregation-transfer-backend") + 1] == "nixl"


def test_events_are_published_where_only_this_user_gets_in(tmp_path: Path) -> None:
    asked = {"publisher": "zmq", "endpoint": "tcp://*:5557", "bind": True, "topic": "t"}
    parsed = Namespace(kv_events_config=json.dumps(asked), dp_size=2)
    publishers = arguments._publish(parsed, tmp_path)
    config = json.loads(parsed.kv_events_config)
    assert publishers == tuple(
        (f"ipc://{tmp_path}/events.tcp:{n}", f"ipc://{tmp_path}/replay.tcp:{n}", "t") for n in (1, 2)
    )
    assert (config["endpoint"], config["replay_endpoint"]) == publishers[0][:2]
    assert "bind" not in config
    assert arguments._publish(Namespace(kv_events_config=None, dp_size=1), tmp_path) == ()
    with pytest.raises(EngineUsageError, match="--kv-events-config"):
        arguments._publish(Namespace(kv_events_config="[]", dp_size=1), tmp_path)


def snapshot(rank: int, at: float, **more: Any) -> Any:
    told = {"num_running_reqs": 0, "num_waiting_reqs": 0, "num_used_tokens": 0, "max_running_requests": 4}
    return SimpleNamespace(dp_rank=rank, timestamp=at, disaggregation=None, **{**told, **more})


def test_load_adds_ranks_up_and_is_nothing_when_idle() -> None:
    loads = Loads()
    busy = snapshot(0, 1.0, num_running_reqs=2, num_waiting_reqs=1, num_used_tokens=33)
    assert loads.update([busy, snapshot(1, 1.0), None])
    assert not loads.update([busy]), "the same as before"
    load = loads.load(16, 200, idle=False)
    assert (load.active_requests, load.queued, load.kv_used, load.kv_total) == (2, 1, 3, 200)
    assert (loads.batch(), loads.settled) == (8, False)
    assert loads.load(16, 200, idle=True).active_requests == 0
    loads.update([snapshot(0, 2.0)])
    assert loads.settled


def test_the_log_tells_stages_and_causes() -> None:
    def error(line: bytes) -> str:
        found = ERROR.search(line)
        return found[1].decode() if found and not any(words in line for words in VAGUE) else ""

    assert error(b"RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.").startswith(
        "Runtime"
    )
    assert not error(b"RuntimeError: Initialization failed. Please see the error messages above.")
    assert not error(b"awq.py:53: UserWarning: Only CUDA supports AWQ currently.")
    bar = b"Multi-thread loading shards:   0% Completed | 0/1 [00:00<?, ?it/s]"
    assert [what for pattern, _, what in STAGES if pattern.search(bar)] == ["loading weights"]
    assert [fraction for _, fraction, _ in STAGES] == sorted(fraction for _, fraction, _ in STAGES)


@pytest.mark.parametrize(
    ("role", "params", "why"),
    [
        (DECODE, {}, "prefill worker has to"),
        (PREFILL, {}, "prompts only"),
        ("aggregated", {"lora": "x"}, "--lora-paths"),
        ("aggregated", {"cache_salt": "x"}, "cache_salt"),
    ],
)
def test_what_this_sglang_cannot_do_is_said(role: str, params: dict[str, Any], why: str) -> None:
    engine = SglangEngine(EngineOptions("m", role=role))
    try:
        engine._bridge = SimpleNamespace(takes=frozenset())  # type: ignore[assignment]
        finish, detail = engine._refusal(sequence(1, [1], **params))
    finally:
        os.close(engine.wakeup_fd)
    assert finish == "error"
    assert why in detail
