"""TensorRT-LLM's adapter in its host child, against a double of TensorRT-LLM whose signatures are read from a file.

The conformance suite runs on the double as well; here is what TensorRT-LLM has of its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines.conformance.bench import Answer, Bench, Driven, request
from engines.conformance.subjects import Subject
from support import trtllm_package
from support.trtllm_package import MIDDLE, NEWEST, OLDEST
from support.trtllm_subject import ARGS

from p2pdyn.engines.base import EngineUsageError, Held, Release, Sequence
from p2pdyn.engines.trtllm.strays import MARK
from p2pdyn.text.card import ModelCard

NEW_TOKENS = 12
Start = Callable[..., list[Driven]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Engines on one version of the double, for ``roles``. At the end nothing broke the contract."""
    benches: list[Bench] = []

    def make(version: str, *roles: str, args: tuple[str, ...] = (), **knobs: Any) -> list[Driven]:
        folder = tmp_path / f"bench{len(benches)}"
        folder.mkdir()
        environment = trtllm_package.environment(tmp_path, version, **knobs)
        model = trtllm_package.model(tmp_path / "bytes")
        subject = Subject("trtllm", "trtllm", (*ARGS, *args), lambda _: str(model), environment)
        benches.append(Bench(subject, folder))
        return benches[-1].start(*(roles or ("aggregated",)))

    yield make
    for bench in reversed(benches):
        bench.close()
    assert trtllm_package.violations(tmp_path) == []


def words(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97, 123), k=length)


def hand_over(prefill: Driven, prompt: list[int], **params: Any) -> Held:
    asked = replace(request(prompt, max_tokens=NEW_TOKENS, **params), hand_over=True)
    prefill.submit(asked)
    return prefill.told(Held, asked)


def taking(prompt: list[int], held: Held, **params: Any) -> Sequence:
    return replace(request(prompt, max_tokens=NEW_TOKENS, **params), remote=held.params)


# ---- versions


@pytest.mark.parametrize("version", [OLDEST, MIDDLE])
def test_older_versions_serve_with_what_they_have(start: Start, version: str) -> None:
    """Aggregated, and handed over: the first token's logprobs travel where the version can, else all is computed."""
    prefill, decode = start(version, "prefill", "decode")
    assert (decode.info.version, decode.info.moves_kv) == (version, f"trtllm-{version}")
    assert (decode.info.kv_blocks, decode.info.block_size, decode.info.context) == (256, 16, 1024)
    assert "min_p" not in ModelCard.unpack(decode.info.card).features
    prompt = words(70)
    for params in ({}, {"logprobs": 2}, {"temperature": 0.9, "seed": 5}):
        (expected,) = prefill.ask(request(prompt, max_tokens=NEW_TOKENS, **params))
        held = hand_over(prefill, prompt, **params)
        (answer,) = decode.ask(taking(prompt, held, **params))
        prefill.order(Release(held.key))
        assert (answer.tokens, answer.finish, answer.detail) == (expected.tokens, "length", "")
        assert answer.logprobs == expected.logprobs
    for engine in (prefill, decode):
        engine.nothing_is_used()


def test_options_are_passed_where_the_signature_has_them(start: Start) -> None:
    first = ("--scheduler-config.waiting-queue-policy", "priority")
    for version, able in ((OLDEST, False), (NEWEST, True)):
        (engine,) = start(version, args=first)
        assert ("priority" in engine.info.features) == able
        asked = [request(words(20), max_tokens=3, priority=ours, cache_salt="s") for ours in (-7, 0, 7)]
        assert [answer.finish for answer in engine.ask(*asked)] == ["length"] * 3
        (answer,) = engine.ask(request(words(20), min_p=0.2, temperature=1.0))
        assert answer.finish == ("length" if able else "error")


def test_what_no_worker_of_the_model_could_do_is_invalid_and_the_rest_an_error(start: Start) -> None:
    """What another version, or other arguments, can do is tried elsewhere."""
    (engine,) = start(OLDEST, args=("--guided-decoding-backend=xgrammar", "--max-num-tokens=64"))
    refused = [
        (request(words(20), min_tokens=3, stop_token_ids=(300, 301)), "invalid", "at most one stop token"),
        (request(words(20), guided={"shape": "round"}), "invalid", "guided decoding by shape"),
        (request(words(20), guided={"json": {"type": "null"}, "regex": "a"}), "invalid", "Only one guide"),
        (request(words(20), min_p=0.2, temperature=1.0), "error", "ignores min_p"),
        (request(words(20), lora="bard"), "error", "--lora-modules"),
        (request(words(65)), "error", "max_num_tokens"),
    ]
    *answers, fine = engine.ask(*(asked for asked, _, _ in refused), request(words(64), max_tokens=3))
    for answer, (_, finish, why) in zip(answers, refused, strict=True):
        assert (answer.tokens, answer.finish) == ([], finish)
        assert why in answer.detail
    assert len(fine.tokens) == 3
    engine.nothing_is_used()


def test_adapters_are_named_and_share_nothing(start: Start, tmp_path: Path) -> None:
    (engine,) = start(NEWEST, args=("--lora-modules", f"poet={tmp_path}"))
    assert "lora" in engine.info.features
    prompt = words(50)
    plain, unknown = engine.ask(request(prompt, max_tokens=4), request(prompt, lora="bard"))
    assert "adapter 'bard' is not known" in unknown.detail
    (other,) = engine.ask(request(prompt, max_tokens=4, lora="poet"))
    assert (other.cached, other.tokens != plain.tokens) == (0, True)
    assert engine.ask(request(prompt, max_tokens=4, lora="poet"))[0].cached == 48


def test_a_stop_token_that_is_taken_away_is_told(start: Start) -> None:
    (engine,) = start(NEWEST)
    whole = engine.text(words(18), max_tokens=9)
    (answer,) = engine.ask(request(words(18), max_tokens=9, stop_token_ids=(whole[4], 300)))
    assert answer.tokens == whole[: whole.index(whole[4]) + 1]
    assert answer.finish == "stop"


# ---- starting


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--no-such-thing=1",), "no argument no_such_thing"),
        (("--kv-cache-config.no-such-thing=1",), "no_such_thing"),
    ],
)
def test_wrong_arguments_are_told_before_loading(start: Start, args: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(EngineUsageError, match=sentence):
        start(NEWEST, args=args)


def test_without_tensorrt_llm_it_says_so(tmp_path: Path) -> None:
    bench = Bench(Subject("trtllm", "trtllm", model=lambda _: str(trtllm_package.model(tmp_path / "m"))), tmp_path)
    with pytest.raises(EngineUsageError, match="TensorRT-LLM is not installed"):
        bench.start("aggregated")
    bench.close()


# ---- hand-overs


def test_an_abort_waits_for_the_first_token_of_a_pull(start: Start) -> None:
    """TensorRT-LLM would else take back blocks that are being written to; the double ends with that."""
    prefill, decode = start(NEWEST, "prefill", "decode", pull_s=0.4)
    prompt = words(90)
    asked = taking(prompt, hand_over(prefill, prompt))
    decode.submit(asked)
    decode.until(lambda: decode.load.kv_total, "a load report")
    decode.abort(asked)
    held = hand_over(prefill, prompt)
    (answer,) = decode.ask(taking(prompt, held))
    assert len(answer.tokens) == NEW_TOKENS
    assert asked.key not in decode.answers
    decode.nothing_is_used()


def test_what_cannot_be_fetched_is_computed(start: Start) -> None:
    prefill, decode = start(NEWEST, "prefill", "decode")
    prompt = words(90)
    held = hand_over(prefill, prompt)
    prefill.order(Release(held.key))
    prefill.nothing_is_used()
    hand_over_of_another = hand_over(prefill, words(40, 1))  # its predecessor's end has been carried out by now
    prefill.order(Release(hand_over_of_another.key))
    (answer,) = decode.ask(taking(prompt, held))
    assert answer.tokens == prefill.text(prompt, max_tokens=NEW_TOKENS)
    decode.nothing_is_used()


def test_a_prompt_that_ends_at_its_first_token_needs_no_pull(start: Start) -> None:
    prefill, decode = start(NEWEST, "prefill", "decode")
    prompt = words(40)
    first = prefill.text(prompt, max_tokens=1)[0]
    held = hand_over(prefill, prompt, stop_token_ids=(first,))
    (answer,) = decode.ask(taking(prompt, held, stop_token_ids=(first,)))
    assert (answer.tokens, answer.finish) == ([first], "stop")


# ---- events


def test_lost_events_forget_what_was_known(start: Start) -> None:
    """What is believed to be cached is never more than what is."""
    (engine,) = start(NEWEST, gap_at=(9, 10, 11))
    hits = [_hit(engine, words(50, seed)) for seed in (0, 0, 1, 2, 0, 1, 3, 3)]
    assert any(told < cached for told, cached in hits), "something was forgotten"
    assert all(told <= cached for told, cached in hits)
    assert hits[-1][0] == hits[-1][1] == 48, "what came since is known"


def _hit(engine: Driven, prompt: list[int]) -> tuple[int, int]:
    engine.settle()
    told = engine.stored(prompt)
    (answer,) = engine.ask(request(prompt, max_tokens=1))
    return told, answer.cached


def test_events_can_be_off(start: Start) -> None:
    (engine,) = start(NEWEST, args=("--kv-cache-config.event-buffer-max-size=0",))
    assert engine.info.kv_events is False
    assert len(engine.text(words(20), max_tokens=3)) == 3


# ---- the end


def test_a_failed_executor_ends_the_engine_with_its_reason(start: Start) -> None:
    (engine,) = start(NEWEST, poison=77)
    engine.submit(request(words(20), max_tokens=77))
    engine.until(lambda: engine.deaths, "the death is told")
    assert engine.deaths == ["TensorRT-LLM's executor has failed: a kernel failed"]


def marked(folder: Path) -> list[int]:
    """The processes that carry the engine's mark."""
    wanted, found = f"{MARK}={folder}".encode(), []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if wanted in (entry / "environ").read_bytes().split(b"\0") and "Z" not in (entry / "stat").read_text():
                found.append(int(entry.name))
    return found


def test_processes_outside_its_group_end_with_it_or_at_the_next_start(start: Start) -> None:
    (engine,) = start(NEWEST, stray=True)
    (stray,) = marked(engine.folder)
    assert os.getpgid(stray) != engine.group
    engine.kill()
    engine.until(lambda: engine.deaths, "the death is told")
    assert marked(engine.folder) == [stray], "the host ends its own group alone"
    engine.close()
    later = engine.again()
    assert stray not in marked(engine.folder)
    later.close()
    assert marked(engine.folder) == []


def test_an_answer_has_no_more_than_was_asked_for(start: Start) -> None:
    (engine,) = start(OLDEST)
    answers: list[Answer] = engine.ask(*(request(words(30, i), max_tokens=1 + i % 3) for i in range(9)))
    assert [len(answer.tokens) for answer in answers] == [1 + i % 3 for i in range(9)]
    engine.nothing_is_used()
