"""SGLang behind the Engine protocol, beyond what every engine owes (tests/engines/conformance)."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from support.ahead import Ahead, Place
from support.engines import Result, sequence
from support.processes import in_group, name_of
from support.sglang_engine import Alone, Sglang, needs_sglang
from support.tiny_llama import CONTEXT
from support.told import stored, told_by
from support.vllm_engine import Lab

from p2pdyn.engines.base import BlocksStored, EngineUsageError, Sequence
from p2pdyn.engines.hosted import weights_of

pytestmark = [needs_sglang, pytest.mark.timeout(400)]

KEYS = count(1)
BLOCK = 16
"""Tokens of a KV block."""
TIE = 1e-3
"""Two best logprobs nearer than this may change places between two ways to compute them."""
PROMPT = "A prompt of more than three blocks of sixteen tokens each, so that there is something to cache. Indeed."


def begun(place: Place) -> Sglang:
    engine = place.lab.make()
    place.lab.begin([engine])
    return engine


def begun_in_vain(place: Place) -> Sglang:
    engine = place.lab.make("--no-such-flag", "3")
    place.lab.begin([engine])
    return engine


AHEAD = {"sglang": begun, "refused": begun_in_vain}


@pytest.fixture(scope="module")
def sglang(lab: Lab, ahead: Ahead) -> Iterator[Sglang]:
    engine: Sglang = ahead.begun("sglang")
    lab.start([engine])
    ahead.loaded("sglang")
    yield engine
    lab.end([engine])


@pytest.fixture(scope="module")
def refused(ahead: Ahead) -> Sglang:
    """An engine that cannot start."""
    engine: Sglang = ahead.begun("refused")
    ahead.loaded("refused")
    return engine


def ask(prompt: str, **params: Any) -> Sequence:
    params.setdefault("ignore_eos", True)
    return sequence(next(KEYS), list(prompt.encode()), **params)


def tokens(lab: Lab, sglang: Sglang, *sequences: Sequence) -> list[Result]:
    return lab.run(sglang.finished(*sequences))


def test_loading_is_told_in_phases_and_describes_the_model(lab: Lab, sglang: Sglang) -> None:
    info, fractions = sglang.info, [fraction for fraction, _ in sglang.progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {"importing SGLang", "starting SGLang", "loading weights", "ready"} <= {what for _, what in sglang.progress}
    assert info is not None
    assert (info.engine, info.model, info.block_size, info.ranks, info.max_num_seqs) == ("sglang", "tiny", 16, 1, 4)
    assert CONTEXT - 8 < info.context <= CONTEXT
    assert info.kv_blocks == 16384 // 16
    assert info.moves_kv == ""
    assert info.weights == weights_of(lab.model, "float32", None, "auto", False), "what any engine says of this folder"
    assert "guided" in info.features
    assert "seed" not in info.features, "SGLang ignores seeds unless it is deterministic"


def test_greedy_ids_are_those_of_sglang_alone(
    lab: Lab, sglang: Sglang, references: list[tuple[list[int], Alone]]
) -> None:
    near = 0
    for prompt, alone in references:
        (result,) = tokens(lab, sglang, sequence(next(KEYS), prompt, max_tokens=len(alone.tokens), ignore_eos=True))
        assert result.finish == "length"
        if result.tokens != alone.tokens:
            near += 1
            at = next(at for at, token in enumerate(alone.tokens) if token != result.tokens[at])
            assert alone.gaps[at] < TIE, f"prompt of {len(prompt)} tokens: another token at {at}"
    assert near <= 1


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"enum": ["yes", "no"]}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("guided", "pattern"),
    [
        ({"json": SCHEMA}, r'\{\s*"ok"\s*:\s*"(yes|no)"\s*\}'),
        ({"regex": "ab[0-9]{3}"}, r"ab[0-9]{3}"),
        ({"grammar": 'root ::= "left" | "right"'}, "left|right"),
        ({"choice": ["red", 'gr"een']}, 'red|gr"een'),
    ],
    ids=["json", "regex", "grammar", "choice"],
)
def test_guided_output_has_the_form_asked_for(lab: Lab, sglang: Sglang, guided: dict[str, Any], pattern: str) -> None:
    (result,) = tokens(lab, sglang, ask("Say", max_tokens=400, guided=guided, ignore_eos=False, temperature=1.0))
    assert result.finish == "stop", result.detail
    text = bytes(token for token in result.tokens if token < 256).decode()
    assert re.fullmatch(pattern, text.strip()), text
    if "json" in guided:
        assert json.loads(text)["ok"] in ("yes", "no")


@pytest.mark.parametrize(
    ("params", "finish", "why"),
    [
        ({"guided": {"json": {"type": "nonsense"}}}, "invalid", "nonsense"),
        ({"guided": {"shape": "round"}}, "invalid", "guided decoding by shape"),
        ({"lora": "nobody"}, "error", "--lora-paths"),
        ({"repetition_penalty": 3.0}, "invalid", "repetition_penalty"),
    ],
    ids=["schema", "kind", "adapter", "range"],
)
def test_what_cannot_be_done_is_said_and_harms_nobody(
    lab: Lab, sglang: Sglang, params: dict[str, Any], finish: str, why: str
) -> None:
    bad, fine = tokens(lab, sglang, ask("No", max_tokens=4, **params), ask(PROMPT, max_tokens=4))
    assert bad.finish == finish
    assert re.search(why, bad.detail), bad.detail
    assert "\n" not in bad.detail
    assert fine.finish == "length"


def test_an_abort_ends_a_sequence_within_a_step(lab: Lab, sglang: Sglang) -> None:
    """As SGLang tells: nothing runs, and in its cache is what was computed until then, to the block."""

    async def body() -> None:
        with told_by(sglang) as (told, _):

            def computed() -> int:
                return sum(stored(told, "aborted").values())

            long = ask(PROMPT, max_tokens=1500, cache_salt="aborted")
            sglang.runner.submit([long])
            await sglang.until(lambda: long.key in sglang.results and len(sglang.results[long.key].tokens) > 20)
            sglang.runner.abort([long.key])
            seen = len(sglang.results[long.key].tokens)
            await sglang.until(
                lambda: (
                    (sglang.runner.load.kv_used, sglang.runner.load.active_requests) == (0, 0)
                    and computed() > len(PROMPT)
                )
            )
            assert computed() <= len(PROMPT) + seen + BLOCK
            assert len(sglang.results[long.key].tokens) == seen

    lab.run(body())


def test_kv_events_tell_what_is_cached(lab: Lab, sglang: Sglang) -> None:
    text = "These blocks are told of when they are computed, by SGLang's own publisher on a local socket."

    async def body() -> None:
        with told_by(sglang) as (told, events):

            def mine() -> list[BlocksStored]:
                block = tuple(text.encode())[:16]
                return [event for event in told if isinstance(event, BlocksStored) and event.tokens[:16] == block]

            await sglang.finished(ask(text, max_tokens=2, cache_salt="told"))
            await sglang.until(mine)
            assert (mine()[0].parent, mine()[0].salt) == (None, "told")
            await sglang.until(lambda: events.status()[0].state == "exact")
            assert (events.status()[0].lost, events.status()[0].dropped) == (0, {})

    lab.run(body())


def test_wrong_arguments_are_refused_with_a_sentence(lab: Lab, refused: Sglang) -> None:
    with pytest.raises(EngineUsageError, match="no-such-flag") as told:
        lab.start([refused])
    assert "\n" not in str(told.value)


def test_the_end_of_a_scheduler_is_told_and_ends_all(lab: Lab, sglang: Sglang) -> None:
    """The last one: it takes the module's engine with it."""

    async def body() -> None:
        running = ask("Until the end", max_tokens=3000)
        sglang.runner.submit([running])
        await sglang.until(lambda: running.key in sglang.results)
        group = sglang.group
        (scheduler,) = [pid for pid in in_group(group) if "scheduler" in name_of(pid)]
        os.kill(scheduler, signal.SIGKILL)
        await sglang.until(lambda: sglang.deaths)
        assert "SGLang's process" in sglang.deaths[0]
        await sglang.until(lambda: not in_group(group))

    lab.run(body())
