"""vLLM behind the Engine protocol, on a tiny random model: what is asked is what is done."""

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
from support.tiny_llama import CONTEXT, END
from support.told import stored, told_by
from support.vllm_engine import Lab, Vllm, needs_vllm

from p2pdyn.engines.base import BlocksStored, EngineError, EngineUsageError, Sequence
from p2pdyn.engines.hosted import weights_of
from p2pdyn.text.card import ModelCard

pytestmark = [needs_vllm, pytest.mark.timeout(400)]

KEYS = count(1)
BLOCK = 32
"""Tokens of a KV block."""


def begun(place: Place) -> Vllm:
    engine = place.lab.make()
    place.lab.begin([engine])
    return engine


EMPTY = "no-model"


def begun_in_vain(place: Place) -> dict[str, Vllm]:
    engines = {
        "flag": place.lab.make("--no-such-flag", "3"),
        "context": place.lab.make("--max-model-len", "1000000"),
        "folder": place.lab.make("--model", str(place.folders.mktemp(EMPTY, numbered=False))),
    }
    place.lab.begin(engines.values())
    return engines


AHEAD = {"vllm": begun, "refused": begun_in_vain}


@pytest.fixture(scope="module")
def vllm(lab: Lab, ahead: Ahead) -> Iterator[Vllm]:
    engine: Vllm = ahead.begun("vllm")
    lab.start([engine])
    ahead.loaded("vllm")
    yield engine
    lab.end([engine])


@pytest.fixture(scope="module")
def refused(ahead: Ahead) -> dict[str, Vllm]:
    """Engines that cannot start, by what is wrong."""
    engines: dict[str, Vllm] = ahead.begun("refused")
    ahead.loaded("refused")
    return engines


def ask(prompt: str, **params: Any) -> Sequence:
    params.setdefault("ignore_eos", True)
    return sequence(next(KEYS), list(prompt.encode()), **params)


def tokens(lab: Lab, vllm: Vllm, *sequences: Sequence) -> list[Result]:
    return lab.run(vllm.finished(*sequences))


PROMPT = "A prompt of more than three blocks of thirty-two tokens each, so that there is something to cache. Indeed."


def test_loading_is_told_in_phases_and_describes_the_model(lab: Lab, vllm: Vllm) -> None:
    info, fractions = vllm.info, [fraction for fraction, _ in vllm.progress]
    phases = [what for _, what in vllm.progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {"importing vLLM", "loading weights", "profiling", "ready"} <= set(phases)
    assert info is not None
    assert (info.engine, info.model, info.context, info.block_size, info.ranks) == ("vllm", "tiny", CONTEXT, 32, 1)
    assert info.kv_blocks > 100
    assert info.moves_kv == ""
    assert info.weights == weights_of(lab.model, "float32", None, "auto", False), "what any engine says of this folder"
    assert "guided" in info.features
    card = ModelCard.unpack(info.card)
    assert card.context == CONTEXT
    assert END in card.eos_token_ids


def test_greedy_output_is_the_same_again_and_comes_from_the_prefix_cache(lab: Lab, vllm: Vllm) -> None:
    (first,) = tokens(lab, vllm, ask(PROMPT, max_tokens=24))
    (again,) = tokens(lab, vllm, ask(PROMPT, max_tokens=24))
    assert first.finish == again.finish == "length"
    assert first.tokens == again.tokens
    assert len(first.tokens) == 24
    assert first.steps > 1, "tokens come one by one, not at the end"
    assert (first.cached, again.cached) == (0, 96)
    (salted,) = tokens(lab, vllm, ask(PROMPT, max_tokens=24, cache_salt="other"))
    assert salted.tokens == first.tokens
    assert salted.cached == 0


def test_a_sequence_goes_on_behind_the_output_of_an_earlier_attempt(lab: Lab, vllm: Vllm) -> None:
    (whole,) = tokens(lab, vllm, ask("Go on", max_tokens=20))
    rest = sequence(next(KEYS), list(b"Go on"), whole.tokens[:12], max_tokens=20, ignore_eos=True)
    done = sequence(next(KEYS), list(b"Go on"), whole.tokens, max_tokens=20, ignore_eos=True)
    resumed, nothing = tokens(lab, vllm, rest, done)
    assert whole.tokens[:12] + resumed.tokens == whole.tokens
    assert resumed.finish == "length"
    assert (nothing.tokens, nothing.finish) == ([], "length")


def test_stop_tokens_end_a_sequence_and_are_its_last_token(lab: Lab, vllm: Vllm) -> None:
    (whole,) = tokens(lab, vllm, ask(PROMPT, max_tokens=24))
    stop = whole.tokens[2]
    where = whole.tokens.index(stop)
    stopped, later = tokens(
        lab,
        vllm,
        ask(PROMPT, max_tokens=24, stop_token_ids=(stop,)),
        ask(PROMPT, max_tokens=24, stop_token_ids=(stop,), min_tokens=where + 3),
    )
    assert (stopped.tokens, stopped.finish) == (whole.tokens[: where + 1], "stop")
    assert stop not in later.tokens[: where + 2]


def test_logprobs_are_the_chosen_tokens_and_of_the_likeliest(lab: Lab, vllm: Vllm) -> None:
    none, two = tokens(lab, vllm, ask(PROMPT, max_tokens=4, logprobs=0), ask(PROMPT, max_tokens=4, logprobs=2))
    assert [others for _, others in none.logprobs] == [()] * 4
    assert len(two.logprobs) == 4
    for token, (chosen, others) in zip(two.tokens, two.logprobs, strict=True):
        assert others[0] == (token, chosen), "greedy: the chosen token is the likeliest"
        assert others[1][1] <= chosen < 0
    assert [chosen for chosen, _ in none.logprobs] == pytest.approx([chosen for chosen, _ in two.logprobs], abs=1e-4)


def test_sampling_is_seeded_and_penalties_bite(lab: Lab, vllm: Vllm) -> None:
    def hot(**params: Any) -> Sequence:
        return ask(PROMPT, max_tokens=16, temperature=1.5, **params)

    one, same, other, narrow, greedy = tokens(
        lab, vllm, hot(seed=1), hot(seed=1), hot(seed=2), hot(seed=3, top_k=1), ask(PROMPT, max_tokens=16)
    )
    assert one.tokens == same.tokens
    assert one.tokens != other.tokens
    assert narrow.tokens == greedy.tokens
    (varied,) = tokens(lab, vllm, ask(PROMPT, max_tokens=16, frequency_penalty=2.0, presence_penalty=2.0))
    assert len(set(varied.tokens)) > len(set(greedy.tokens))


def test_a_seed_does_not_depend_on_the_parts_a_prompt_is_computed_in(lab: Lab, vllm: Vllm) -> None:
    """Longer than the 2048 tokens of a step: vLLM samples after each part, which its generators on CPU cannot undo."""

    def long(**params: Any) -> Sequence:
        return ask("Long. " + PROMPT * 28, max_tokens=16, temperature=1.5, seed=4, **params)

    (parts,) = tokens(lab, vllm, long())
    (whole,) = tokens(lab, vllm, long())
    (beside, _) = tokens(lab, vllm, long(cache_salt="other"), ask(PROMPT, max_tokens=64, temperature=1.5, seed=5))
    assert (parts.finish, parts.cached, beside.cached) == ("length", 0, 0)
    assert whole.cached > len(PROMPT) * 27
    assert parts.tokens == whole.tokens == beside.tokens


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
        ({"choice": ["red", "green"]}, "red|green"),
    ],
    ids=["json", "regex", "grammar", "choice"],
)
def test_guided_output_has_the_form_asked_for(lab: Lab, vllm: Vllm, guided: dict[str, Any], pattern: str) -> None:
    (result,) = tokens(lab, vllm, ask("Say", max_tokens=400, guided=guided, ignore_eos=False, temperature=1.0, seed=5))
    assert result.finish == "stop", result.detail
    text = bytes(token for token in result.tokens if token < 256).decode()
    assert re.fullmatch(pattern, text.strip()), text
    if "json" in guided:
        assert json.loads(text)["ok"] in ("yes", "no")


@pytest.mark.parametrize(
    ("params", "finish", "why"),
    [
        ({"guided": {"json": {"type": "nonsense"}}}, "invalid", "nonsense|schema|grammar|JSON|type"),
        ({"guided": {"shape": "round"}}, "invalid", "guided decoding by shape"),
        ({"lora": "nobody"}, "error", "--lora-modules"),
        ({"temperature": 50.0}, "invalid", "temperature"),
    ],
    ids=["schema", "kind", "adapter", "range"],
)
def test_what_cannot_be_done_is_said_and_harms_nobody(
    lab: Lab, vllm: Vllm, params: dict[str, Any], finish: str, why: str
) -> None:
    good = ask(PROMPT, max_tokens=4)
    bad, fine = tokens(lab, vllm, ask("No", max_tokens=4, **params), good)
    assert bad.finish == finish
    assert re.search(why, bad.detail), bad.detail
    assert fine.finish == "length"


def test_prompts_that_do_not_fit_are_refused(lab: Lab, vllm: Vllm) -> None:
    empty, long, edge = tokens(
        lab, vllm, ask(""), ask("x" * CONTEXT), ask("x" * (CONTEXT - 3), max_tokens=50, temperature=0.0)
    )
    assert (empty.finish, long.finish) == ("invalid", "invalid")
    assert "shorten it" in long.detail
    assert (len(edge.tokens), edge.finish) == (3, "length")


@pytest.mark.parametrize("shift", [0, 4, 8])
def test_an_abort_ends_a_sequence_within_a_step(lab: Lab, vllm: Vllm, shift: int) -> None:
    """As vLLM tells: all it computes of aborted sequences comes before what is submitted after the abort. One of three
    sequences fills a block every eleven steps, with each shift in other steps."""

    async def body() -> None:
        with told_by(vllm) as (told, _):
            prompts = [PROMPT[skip:] for skip in (shift, shift + 11, shift + 22)]
            three = [ask(prompt, max_tokens=3000, cache_salt=f"aborted {shift}") for prompt in prompts]
            vllm.runner.submit(three)
            await vllm.until(lambda: all(one.key in vllm.results for one in three) and vllm.runner.load.kv_used > 0)
            vllm.runner.abort([one.key for one in three])
            seen = [len(vllm.results[one.key].tokens) for one in three]
            behind = ask(PROMPT, max_tokens=BLOCK, cache_salt=f"behind {shift}")  # the last one that runs beside three
            at_once = ask("Nor this", max_tokens=50, cache_salt=f"at once {shift}")
            vllm.runner.submit([behind, at_once])
            vllm.runner.abort([at_once.key])
            await vllm.until(lambda: sum(stored(told, f"behind {shift}").values()) > len(PROMPT))
            assert max(stored(told, f"aborted {shift}")) < min(stored(told, f"behind {shift}"))
            assert not stored(told, f"at once {shift}")
            await vllm.until(lambda: vllm.runner.load.kv_used == 0)
            assert [len(vllm.results[one.key].tokens) for one in three] == seen
            assert at_once.key not in vllm.results

    lab.run(body())


def test_load_tells_running_and_queued(lab: Lab, vllm: Vllm) -> None:
    async def body() -> None:
        many = [ask(f"Number {number}", max_tokens=60) for number in range(7)]
        vllm.runner.submit(many)
        await vllm.until(lambda: vllm.runner.load.active_requests == 4 and vllm.runner.load.queued > 0)
        assert 0 < vllm.runner.load.kv_used <= vllm.runner.load.kv_total == vllm.info.kv_blocks
        await vllm.until(lambda: all(one.key in vllm.results and vllm.results[one.key].finish for one in many))
        await vllm.until(lambda: (vllm.runner.load.active_requests, vllm.runner.load.queued) == (0, 0))

    lab.run(body())


def test_kv_events_tell_what_is_cached(lab: Lab, vllm: Vllm) -> None:
    text = "These blocks are told of as soon as they are computed, by vLLM's own publisher on a local socket."

    async def body() -> None:
        with told_by(vllm) as (told, events):

            def mine() -> list[BlocksStored]:
                block = tuple(text.encode())[:BLOCK]
                return [event for event in told if isinstance(event, BlocksStored) and event.tokens[:BLOCK] == block]

            await vllm.finished(ask(text, max_tokens=2, cache_salt="told"))
            await vllm.until(mine)
            assert [(event.parent, event.salt) for event in mine()] == [(None, "told")]
            await vllm.until(lambda: events.status()[0].state == "exact")
            assert events.status()[0].lost == 0

    lab.run(body())


def test_wrong_arguments_are_refused_with_a_sentence(lab: Lab, refused: dict[str, Vllm]) -> None:
    with pytest.raises(EngineUsageError, match="no-such-flag") as told:
        lab.start([refused["flag"]])
    assert "\n" not in str(told.value)


def test_arguments_that_do_not_fit_the_model_are_refused_with_the_reason(lab: Lab, refused: dict[str, Vllm]) -> None:
    with pytest.raises(EngineUsageError, match=r"max_model_len|max_position_embeddings"):
        lab.start([refused["context"]])


def test_a_folder_without_a_model_is_named(lab: Lab, refused: dict[str, Vllm]) -> None:
    with pytest.raises(EngineError, match=f"/{EMPTY}"):
        lab.start([refused["folder"]])


def test_the_end_of_the_engine_core_is_told_and_ends_all(lab: Lab, vllm: Vllm) -> None:
    """The last one: it takes the module's engine with it."""

    async def body() -> None:
        running = ask("Until the end", max_tokens=3000)
        vllm.runner.submit([running])
        await vllm.until(lambda: running.key in vllm.results)
        group = vllm.runner.pid
        assert group is not None
        (core,) = [pid for pid in in_group(group) if "EngineCor" in name_of(pid)]
        os.kill(core, signal.SIGKILL)
        await vllm.until(lambda: vllm.deaths)
        assert "engine core" in vllm.deaths[0]
        await vllm.until(lambda: not in_group(group))

    lab.run(body())
