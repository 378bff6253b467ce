"""Prefill in one vLLM, decode in another, KV blocks over NIXL: the same tokens, and nothing held longer than needed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest
from support import vllm_probe
from support.ahead import Ahead, Place
from support.engines import Result, sequence
from support.vllm_engine import Lab, Vllm, needs_vllm, signal_group

from p2pdyn.engines.base import Release, Sequence
from p2pdyn.engines.vllm.arguments import LEASE_S

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

KEYS = count(1)
NEW_TOKENS = 64
FREED_S = 5.0
"""Blocks are free so soon after whoever wanted them gave them up."""
BLOCKS = 400
"""Few enough that some prompts of 3000 tokens take all that were given back."""
TIE = 1e-3
"""Two best logprobs nearer than this may change places between two ways to compute them."""


class Pair(NamedTuple):
    prefill: Vllm
    decode: Vllm


def one_by_one(lab: Lab, role: str, node: str, epoch: int) -> Vllm:
    args = ("--max-num-seqs", "1", "--num-gpu-blocks-override", str(BLOCKS))
    return lab.make(*args, "--worker-extension-cls", "support.vllm_probe.Probe", role=role, node=node, epoch=epoch)


def begun(place: Place) -> Pair:
    engines = Pair(
        one_by_one(place.lab, "prefill", "aaaaaaaaaaaaaaaa", 11),
        one_by_one(place.lab, "decode", "bbbbbbbbbbbbbbbb", 12),
    )
    place.lab.begin(engines)
    return engines


def another_begun(place: Place) -> Vllm:
    engine = one_by_one(place.lab, "decode", "cccccccccccccccc", 13)
    place.lab.begin([engine])
    return engine


AHEAD = {"pair": begun, "other": another_begun}


@pytest.fixture(scope="module")
def pair(lab: Lab, ahead: Ahead) -> Iterator[Pair]:
    engines: Pair = ahead.begun("pair")
    lab.start(engines)
    ahead.loaded("pair")
    yield engines
    lab.end(engines)


@pytest.fixture(scope="module")
def other(lab: Lab, ahead: Ahead) -> Iterator[Vllm]:
    """Another decode worker."""
    engine: Vllm = ahead.begun("other")
    lab.start([engine])
    yield engine
    lab.end([engine])


async def nothing_open(probes: Path, *engines: Vllm) -> None:
    """No block in use, no lease, no read and no handle of one, as vLLM itself counts them."""
    for engine in engines:
        await engine.until(lambda one=engine: one.runner.load.kv_used == 0)
        since = time.monotonic()

        def empty(group: int = engine.group, since: float = since) -> bool:
            told = vllm_probe.counts(probes, group)
            return told.pop("at", 0.0) > since and not any(told.values())

        await engine.until(empty)


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(256) for _ in range(length)]


def ask(tokens: list[int], **params: Any) -> Sequence:
    params.setdefault("max_tokens", NEW_TOKENS)
    params.setdefault("ignore_eos", True)
    return sequence(next(KEYS), tokens, **params)


async def handed_over(pair: Pair, tokens: list[int], **params: Any) -> tuple[int, bytes]:
    """Have the prompt computed and held: (key, what the decode side is to be told)."""
    asked = ask(tokens, **params)
    asked.hand_over = True
    pair.prefill.runner.submit([asked])
    await pair.prefill.until(lambda: asked.key in pair.prefill.held)
    assert asked.key not in pair.prefill.results, "the prefill worker tells no token"
    return asked.key, pair.prefill.held[asked.key].params


async def decoded(pair: Pair, tokens: list[int], params: bytes, **more: Any) -> Result:
    asked = ask(tokens, **more)
    asked.remote = params
    (result,) = await pair.decode.finished(asked)
    return result


def test_both_say_that_they_move_kv_and_by_what_name(lab: Lab, pair: Pair) -> None:
    async def body() -> None:
        key, packed = await handed_over(pair, prompt(100))
        params = msgpack.unpackb(packed)
        assert params["remote_engine_id"] == "aaaaaaaaaaaaaaaa-11"
        assert params["remote_host"] == "127.0.0.1"
        pair.prefill.runner.transfer([Release(key)])
        await pair.prefill.until(lambda: pair.prefill.runner.load.kv_used == 0)

    assert [engine.info.moves_kv for engine in pair if engine.info] == ["nixl", "nixl"]
    lab.run(body())


def test_prefill_and_decode_give_the_tokens_of_one_engine(lab: Lab, pair: Pair, probes: Path) -> None:
    """Ten prompts of 200 to 2000 tokens, greedy, float32. The reference is the decode engine computing all itself."""

    async def body() -> None:
        near = 0
        for length in range(200, 2001, 200):
            tokens = prompt(length)
            _, params = await handed_over(pair, tokens)
            pulled = await decoded(pair, tokens, params)
            (own,) = await pair.decode.finished(ask(tokens, cache_salt="own", logprobs=2))
            assert own.cached == 0
            assert len(pulled.tokens) == NEW_TOKENS
            if pulled.tokens != own.tokens:
                near += 1
                at = next(at for at in range(NEW_TOKENS) if pulled.tokens[at] != own.tokens[at])
                _, ((_, best), (_, second)) = own.logprobs[at]
                assert best - second < TIE, f"prompt of {length} tokens: another token at {at}"
        assert near <= 1
        await nothing_open(probes, *pair)

    lab.run(body(), 240)


def test_a_hand_over_that_nobody_will_pull_is_released_at_once(lab: Lab, pair: Pair, probes: Path) -> None:
    async def body() -> None:
        key, _ = await handed_over(pair, prompt(640))
        await pair.prefill.until(lambda: pair.prefill.runner.load.kv_used >= 20)
        begun = time.monotonic()
        pair.prefill.runner.transfer([Release(key), Release(10**9)])
        await nothing_open(probes, pair.prefill)
        assert time.monotonic() - begun < FREED_S, "not by the end of its lease"

    lab.run(body())


def test_an_aborted_prefill_holds_nothing(lab: Lab, pair: Pair, probes: Path) -> None:
    async def body() -> None:
        asked = ask(prompt(4000))
        asked.hand_over = True
        pair.prefill.runner.submit([asked])
        begun = time.monotonic()
        pair.prefill.runner.abort([asked.key])
        await pair.prefill.finished(ask([1, 2, 3], max_tokens=2))
        await nothing_open(probes, pair.prefill)
        assert time.monotonic() - begun < FREED_S
        assert asked.key not in pair.prefill.held

    lab.run(body())


def test_a_decode_that_is_aborted_in_the_queue_gives_the_blocks_back(lab: Lab, pair: Pair, probes: Path) -> None:
    async def body() -> None:
        busy = ask(prompt(50), max_tokens=2000)
        pair.decode.runner.submit([busy])
        await pair.decode.until(lambda: busy.key in pair.decode.results)
        _, params = await handed_over(pair, prompt(500))
        asked = ask(prompt(500))
        asked.remote = params
        pair.decode.runner.submit([asked])
        await pair.decode.until(lambda: pair.decode.runner.load.queued == 1)
        begun = time.monotonic()
        pair.decode.runner.abort([asked.key])
        await nothing_open(probes, pair.prefill)
        assert time.monotonic() - begun < FREED_S
        pair.decode.runner.abort([busy.key])
        await pair.decode.finished(ask([1], max_tokens=2))
        await nothing_open(probes, pair.decode)

    lab.run(body())


def test_what_is_no_answer_of_a_prefill_worker_is_an_error_of_that_request_alone(lab: Lab, pair: Pair) -> None:
    async def body() -> None:
        wrong = await decoded(pair, prompt(40), b"\x01nonsense")
        assert wrong.finish == "error"
        (fine,) = await pair.decode.finished(ask(prompt(40), max_tokens=2))
        assert fine.finish == "length"

    lab.run(body())


def test_a_decode_worker_that_stood_still_computes_itself(lab: Lab, pair: Pair) -> None:
    """Stopped with a pull queued until the blocks at the other side are given to others: right tokens all the same."""

    async def body() -> None:
        tokens = prompt(700)
        (own,) = await pair.decode.finished(ask(tokens, cache_salt="still"))
        busy = ask(prompt(30), max_tokens=3000)
        pair.decode.runner.submit([busy])
        await pair.decode.until(lambda: busy.key in pair.decode.results)
        _, params = await handed_over(pair, tokens)
        asked = ask(tokens)
        asked.remote = params
        pair.decode.runner.submit([asked])
        await pair.decode.until(lambda: pair.decode.runner.load.queued == 1)
        signal_group(pair.decode, signal.SIGSTOP)
        try:
            await pair.prefill.until(lambda: pair.prefill.runner.load.kv_used == 0)  # its lease has ended
            for other in range(5):
                await pair.prefill.finished(ask(prompt(3000 + other), max_tokens=1))
        finally:
            signal_group(pair.decode, signal.SIGCONT)
        pair.decode.runner.abort([busy.key])
        await pair.decode.until(lambda: asked.key in pair.decode.results and pair.decode.results[asked.key].finish)
        assert pair.decode.results[asked.key].tokens == own.tokens

    lab.run(body(), 200)


def test_a_decode_worker_that_dies_amid_a_pull_costs_the_blocks_no_longer_than_the_lease(
    lab: Lab, pair: Pair, other: Vllm, probes: Path
) -> None:
    """The prefill worker serves on meanwhile, and another decode worker reads from it after that."""
    reader = Pair(pair.prefill, other)

    async def body() -> None:
        tokens = prompt(3000)
        (own,) = await pair.decode.finished(ask(tokens, cache_salt="own"))
        _, params = await handed_over(pair, prompt(500))
        await decoded(reader, prompt(500), params)  # they have met
        _, params = await handed_over(pair, tokens)
        pulling = ask(tokens)
        pulling.remote = params
        signal_group(pair.prefill, signal.SIGSTOP)  # so that the read lasts
        try:
            other.runner.submit([pulling])
            await other.until(lambda: vllm_probe.counts(probes, other.group)["_recving_transfers"])
            signal_group(other, signal.SIGKILL)
        finally:
            signal_group(pair.prefill, signal.SIGCONT)
        began = time.monotonic()
        await pair.prefill.finished(ask([1, 2, 3], max_tokens=2))
        await nothing_open(probes, pair.prefill)
        assert time.monotonic() - began < LEASE_S + 2
        assert other.deaths
        assert pulling.key not in other.results
        _, params = await handed_over(pair, tokens)
        assert (await decoded(pair, tokens, params)).tokens == own.tokens
        await nothing_open(probes, *pair)

    lab.run(body())


def test_a_prefill_worker_that_died_is_not_waited_for_long(lab: Lab, pair: Pair, probes: Path) -> None:
    """The last one: it takes the module's prefill engine with it. The decode side computes the prompt itself."""

    async def body() -> None:
        tokens = prompt(600)
        (own,) = await pair.decode.finished(ask(tokens, cache_salt="alone"))
        _, params = await handed_over(pair, tokens)
        signal_group(pair.prefill, signal.SIGKILL)
        result = await decoded(pair, tokens, params)
        assert result.tokens == own.tokens
        await nothing_open(probes, pair.decode)

    lab.run(body())
