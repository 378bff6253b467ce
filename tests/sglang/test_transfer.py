"""Prefill in one SGLang, decode in another, KV blocks over NIXL: the same tokens, and no room stays open in vain."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import msgpack
import pytest
from support.ahead import Ahead, Place
from support.engines import Result, sequence
from support.sglang_engine import ENVIRONMENT, Alone, Sglang, needs_sglang, prompt
from support.vllm_engine import Lab, signal_group

from p2pdyn.engines.base import Release, Sequence
from p2pdyn.engines.child import ChildRunner

pytestmark = [needs_sglang, pytest.mark.timeout(600)]

KEYS = count(1)
TIE = 1e-3
FREED_S = 5.0
"""Blocks are free, and rooms closed, so soon after whoever wanted them gave them up."""
ROOM_S, PULL_S = (float(ENVIRONMENT[f"SGLANG_DISAGGREGATION_{name}_TIMEOUT"]) for name in ("BOOTSTRAP", "WAITING"))


class Pair(NamedTuple):
    prefill: Sglang
    decode: Sglang


def begun(place: Place) -> Pair:
    engines = Pair(place.lab.make(role="prefill"), place.lab.make(role="decode"))
    place.lab.begin(engines)
    return engines


AHEAD = {"pair": begun}


@pytest.fixture(scope="module")
def pair(lab: Lab, ahead: Ahead) -> Iterator[Pair]:
    engines: Pair = ahead.begun("pair")
    lab.start(engines)
    yield engines
    lab.end(engines)


def ask(tokens: list[int], **params: Any) -> Sequence:
    return sequence(next(KEYS), tokens, **{"max_tokens": 16, "ignore_eos": True, **params})


async def opened(pair: Pair, tokens: list[int], **params: Any) -> tuple[int, bytes]:
    """Have the prompt handed over: (key, what the decode side is to be told)."""
    asked = replace(ask(tokens, **params), hand_over=True)
    pair.prefill.runner.submit([asked])
    await pair.prefill.until(lambda: asked.key in pair.prefill.held)
    return asked.key, pair.prefill.held[asked.key].params


async def decoded(pair: Pair, tokens: list[int], params: bytes, **more: Any) -> Result:
    (result,) = await pair.decode.finished(replace(ask(tokens, **more), remote=params))
    return result


async def handed_over(pair: Pair, tokens: list[int], **params: Any) -> Result:
    key, room = await opened(pair, tokens, **params)
    result = await decoded(pair, tokens, room, **params)
    await pair.prefill.until(lambda: pair.prefill.held[key].computed)
    return result


async def nothing_open(*engines: Sglang) -> None:
    """No sequence is open, and so no block in use, no room and no pull, as SGLang itself counts them."""

    def empty(one: ChildRunner) -> bool:
        return not one.has_work and (one.load.kv_used, one.load.queued, one.load.active_requests) == (0, 0, 0)

    for engine in engines:
        await engine.until(partial(empty, engine.runner))


def test_a_room_is_told_at_once_and_its_release_closes_it(lab: Lab, pair: Pair) -> None:
    async def body() -> None:
        begun = time.monotonic()
        key, packed = await opened(pair, prompt(640))
        room = msgpack.unpackb(packed)
        assert room["bootstrap_host"] == "127.0.0.1"
        assert not pair.prefill.held[key].computed
        assert key not in pair.prefill.results, "the prefill worker tells no token"
        pair.prefill.runner.transfer([Release(key), Release(10**9)])
        await pair.prefill.until(lambda: pair.prefill.held[key].computed)
        await nothing_open(pair.prefill)
        assert time.monotonic() - begun < FREED_S, "not by the room's own time"
        for _ in range(5):  # whenever the release comes: with the prompt on its way, computed, or known to nobody yet
            key, _ = await opened(pair, prompt(100))
            pair.prefill.runner.transfer([Release(key)])
            await nothing_open(pair.prefill)

    assert pair.prefill.info is not None
    assert pair.decode.info is not None
    assert pair.prefill.info.moves_kv == pair.decode.info.moves_kv
    assert pair.prefill.info.moves_kv.startswith("sglang-nixl-")
    lab.run(body())


def test_prefill_and_decode_give_the_tokens_of_one_engine(
    lab: Lab, pair: Pair, references: list[tuple[list[int], Alone]]
) -> None:
    """Ten prompts of 200 to 2000 tokens, greedy, float32. The reference is SGLang alone, all in one process."""

    async def body() -> None:
        near = 0
        for tokens, alone in references:
            result = await handed_over(pair, tokens, max_tokens=len(alone.tokens))
            assert (result.finish, len(result.tokens)) == ("length", len(alone.tokens)), result.detail
            if result.tokens != alone.tokens:
                near += 1
                at = next(at for at, token in enumerate(alone.tokens) if token != result.tokens[at])
                assert alone.gaps[at] < TIE, f"prompt of {len(tokens)} tokens: another token at {at}"
        assert near <= 1
        again = await handed_over(pair, references[4][0], max_tokens=4)
        assert again.cached >= len(references[4][0]) - 16, "the prefill side's prefix cache, told by the decode side"
        await nothing_open(*pair)

    lab.run(body(), 240)


def test_a_decode_side_alone_computes_nothing_and_says_so(lab: Lab, pair: Pair) -> None:
    async def body() -> None:
        (local,) = await pair.decode.finished(ask(prompt(40)))
        assert (local.finish, local.tokens) == ("error", [])
        assert "prefill worker" in local.detail
        wrong = await decoded(pair, prompt(40), b"\x01nonsense")
        assert wrong.finish == "error"
        assert (await handed_over(pair, prompt(40))).finish == "length"

    lab.run(body())


def test_a_room_that_nobody_comes_to_ends_by_itself(lab: Lab, pair: Pair) -> None:
    async def body() -> None:
        begun = time.monotonic()
        key, _ = await opened(pair, prompt(700))
        await pair.prefill.until(lambda: pair.prefill.held[key].computed)
        assert time.monotonic() - begun < ROOM_S + FREED_S
        await nothing_open(pair.prefill)

    lab.run(body())


def test_whoever_comes_to_a_room_that_is_not_there_is_told(lab: Lab, pair: Pair) -> None:
    async def body() -> None:
        key, packed = await opened(pair, prompt(500))
        pair.prefill.runner.transfer([Release(key)])
        await pair.prefill.until(lambda: pair.prefill.held[key].computed)
        begun = time.monotonic()
        late = await decoded(pair, prompt(500), packed)
        assert (late.finish, late.tokens) == ("error", [])
        assert time.monotonic() - begun < PULL_S + FREED_S
        assert (await handed_over(pair, prompt(500))).finish == "length"
        await nothing_open(*pair)

    lab.run(body())


def test_a_pull_that_is_aborted_ends_on_both_sides(lab: Lab, pair: Pair) -> None:
    """The client is gone, with the prompt under way."""

    async def body() -> None:
        key, packed = await opened(pair, prompt(3000))
        pulling = replace(ask(prompt(3000)), remote=packed)
        pair.decode.runner.submit([pulling])
        await pair.decode.until(lambda: pair.decode.runner.load.queued == 1)
        begun = time.monotonic()
        pair.decode.runner.abort([pulling.key])
        pair.prefill.runner.transfer([Release(key)])
        await pair.prefill.until(lambda: pair.prefill.held[key].computed)
        await nothing_open(*pair)
        assert time.monotonic() - begun < FREED_S
        assert pulling.key not in pair.decode.results
        assert (await handed_over(pair, prompt(100))).finish == "length"

    lab.run(body())


def test_a_decode_side_that_dies_amid_a_pull_costs_the_prefill_side_nothing(lab: Lab, pair: Pair) -> None:
    """The last one: it takes the module's decode engine with it."""

    async def body() -> None:
        tokens = prompt(3000)
        key, packed = await opened(pair, tokens)
        signal_group(pair.prefill, signal.SIGSTOP)  # so that the pull lasts
        try:
            pair.decode.runner.submit([replace(ask(tokens), remote=packed)])
            await pair.decode.until(lambda: pair.decode.runner.load.queued == 1)
            signal_group(pair.decode, signal.SIGKILL)
            await pair.decode.until(lambda: pair.decode.deaths)
        finally:
            signal_group(pair.prefill, signal.SIGCONT)
        begun = time.monotonic()
        await pair.prefill.until(lambda: pair.prefill.held[key].computed)
        await nothing_open(pair.prefill)
        assert time.monotonic() - begun < ROOM_S + FREED_S
        key, _ = await opened(pair, prompt(100))
        pair.prefill.runner.transfer([Release(key)])
        await nothing_open(pair.prefill)
        assert not pair.prefill.deaths

    lab.run(body())
