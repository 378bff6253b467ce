"""What a worker publishes of its speed, from engines whose speed is known."""

from __future__ import annotations

import random
from collections.abc import Iterable
from math import e, exp

import pytest

from p2pdyn.constants import WORK_MEMORY_S
from p2pdyn.core.speed import COLD_STALL_S, LONG_S, SAMPLE_S, STALL_S, PullMeter, SpeedMeter


def step(meter: SpeedMeter, decoding: int, blocks: int, now: float) -> None:
    took = meter.step(decoding, now)
    if took:
        meter.sample(took, blocks)


def test_prompts_that_are_computed_together_count_together() -> None:
    meter = SpeedMeter()
    for batch in range(3):
        for key in range(5):
            meter.submitted(key, 1500, 0, 1.5 * batch)
        meter.first_tokens([(key, 0) for key in range(5)], 1.5 * (batch + 1))
    assert meter.prefill_tps == pytest.approx(5000)


def test_one_slow_first_prompt_is_no_speed() -> None:
    """Engines compile, allocate and fault pages in at their first prompts; who is then thought slow gets no second."""
    meter, now = SpeedMeter(), 0.0
    for key, took in enumerate((3.0, 0.1, 0.1)):
        assert meter.prefill_tps == 0.0
        meter.submitted(key, 1000, 0, now)
        now += took
        meter.first_tokens([(key, 0)], now)
    assert meter.prefill_tps == 0.0, "the three are far apart"
    for key in range(3, 40):
        meter.submitted(key, 1000, 0, now)
        now += 0.1
        meter.first_tokens([(key, 0)], now)
    assert meter.prefill_tps == pytest.approx(10_000, rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_prompts_of_all_lengths_with_their_overhead_agree(seed: int) -> None:
    """5 ms a prompt and 20,000 tokens a second, with a quarter of noise."""
    meter, rng, now = SpeedMeter(), random.Random(seed), 0.0
    for key in range(30):
        tokens = rng.randrange(100, 8000)
        meter.submitted(key, tokens, 0, now)
        now += (0.005 + tokens / 20_000) * rng.lognormvariate(0, 0.25)
        meter.first_tokens([(key, 0)], now)
    assert meter.prefill_tps == pytest.approx(19_000, rel=0.3)


def test_nothing_measured_is_zero() -> None:
    meter = SpeedMeter()
    assert (meter.prefill_tps, meter.itl_ms(100), meter.itl_per_block_ms, meter.backlog) == (0, 0, 0, 0)


def test_an_engine_may_be_as_quiet_as_its_prompts_are_long() -> None:
    meter = SpeedMeter()
    meter.submitted(1, 10_000, 0, 0.0)
    assert meter.patience_s == COLD_STALL_S
    meter.first_tokens([(1, 0)], 2.0)
    assert meter.patience_s == STALL_S
    meter.submitted(2, 200_000, 0, 3.0)
    assert meter.patience_s == pytest.approx(STALL_S + 3 * 40)


def test_prefill_speed_of_a_queue_computed_one_after_the_other() -> None:
    meter, rng = SpeedMeter(), random.Random(1)
    prompts = [rng.randrange(100, 8000) for _ in range(40)]
    for key, tokens in enumerate(prompts):
        meter.submitted(key, tokens, 0, 0.0)
    assert meter.backlog == sum(prompts)
    now = 0.0
    for key, tokens in enumerate(prompts):
        now += tokens / 5000
        meter.first_tokens([(key, 0)], now)
    assert meter.prefill_tps == pytest.approx(5000)
    assert meter.backlog == 0


def test_waiting_for_a_place_in_the_batch_is_no_computing() -> None:
    """A batch that is full of long answers: a place each 50 ms, and a prompt of 100 tokens is computed in 5."""
    meter, now = SpeedMeter(), 0.0
    for key in range(40):
        meter.submitted(key, 100, 0, 0.0)
    for key in range(30):
        now += 0.05
        meter.freed(1, now)
        meter.first_tokens([(key, 0)], now + 0.005)
    assert meter.prefill_tps == pytest.approx(20_000)
    meter.unhindered()
    for key in range(100, 140):
        now += 0.05
        meter.submitted(key, 100, 0, now)
        meter.first_tokens([(key, 0)], now + 0.005)
    assert meter.prefill_tps == pytest.approx(20_000)


def test_the_backlog_is_what_routers_expect_to_be_computed() -> None:
    meter = SpeedMeter()
    meter.submitted(1, 10_000, 1_000, 0.0)
    meter.submitted(2, 10_000, 0, 0.0)  # nobody knows: all of it
    meter.submitted(3, 100, 5_000, 0.0)  # never more than there is
    assert meter.backlog == 1_000 + 10_000 + 100
    meter.first_tokens([(2, 9_000)], 1.0)
    meter.gone(3)
    assert meter.backlog == 1_000


def test_work_is_what_was_taken_on_and_fades() -> None:
    meter, now = SpeedMeter(), 0.0
    for key in range(3):
        meter.submitted(key, 1000, 1000, now)
        assert meter.work_s(now) == 0.0  # no speed is sure yet
        now += 0.5
        meter.first_tokens([(key, 0)], now)
    meter.submitted(4, 500, 100, now)
    meter.submitted(5, 300, 0, now)  # nobody knows how much of it is cached
    tokens = 400 + sum(1000 * exp((begun - now) / WORK_MEMORY_S) for begun in (0.0, 0.5, 1.0))
    assert meter.work_s(now) == pytest.approx(tokens / 2000)
    meter.gone(4)
    assert meter.work_s(now + WORK_MEMORY_S) == pytest.approx(tokens / 2000 / e)


def prompts(meter: SpeedMeter, tps: Iterable[float], now: float = 0.0) -> float:
    """Prompts of 1000 tokens one after the other at these speeds; when the last one was computed."""
    for speed in tps:
        key = round(now * 1e6)
        meter.submitted(key, 1000, 1000, now)
        now += 1000 / speed
        meter.first_tokens([(key, 0)], now)
    return now


def test_noise_of_the_speed_is_no_work() -> None:
    meter = SpeedMeter()
    now = prompts(meter, [5000.0] * 40)
    before = meter.work_s(now)
    now = prompts(meter, [3500.0] * 3, now)
    assert meter.prefill_tps < 4600
    assert meter.work_s(now) == pytest.approx(before * 43 / 40, rel=0.06)


def test_work_of_a_cold_engine_does_not_stay_dear() -> None:
    meter = SpeedMeter()
    now = prompts(meter, [200.0] * 4)
    assert meter.work_s(now) > 10
    now = prompts(meter, [20_000.0] * 40, now)
    assert meter.work_s(now) < 1.5 * 44_000 / meter.prefill_tps


def test_cached_tokens_took_no_time() -> None:
    meter = SpeedMeter()
    for key in range(5):
        meter.submitted(key, 4000, 0, float(key))
        meter.first_tokens([(key, 3000)], key + 0.25)
    assert meter.prefill_tps == pytest.approx(4000)


def test_idle_time_between_prompts_does_not_count() -> None:
    meter = SpeedMeter()
    for key in range(5):
        meter.submitted(key, 1000, 0, 100.0 * key)
        meter.first_tokens([(key, 0)], 100.0 * key + 0.5)
    assert meter.prefill_tps == pytest.approx(2000)


def test_short_and_aborted_prompts_are_no_measure() -> None:
    meter = SpeedMeter()
    meter.submitted(1, 10, 0, 0.0)
    meter.first_tokens([(1, 0)], 1.0)
    meter.submitted(2, 1000, 0, 1.0)
    meter.gone(2)
    meter.first_tokens([(2, 0)], 9.0)
    assert meter.prefill_tps == 0
    assert meter.backlog == 0


def test_a_worker_that_becomes_slower_is_seen_to() -> None:
    meter, now = SpeedMeter(), 0.0
    for key in range(60):
        meter.submitted(key, 1000, 0, now)
        now += 0.1 if key < 20 else 0.4
        meter.first_tokens([(key, 0)], now)
    assert meter.prefill_tps == pytest.approx(2500, rel=0.05)


def test_decode_steps_give_itl_and_its_growth_with_blocks() -> None:
    meter, rng, now = SpeedMeter(), random.Random(2), 0.0
    for _ in range(400):
        blocks = rng.randrange(10, 5000)
        now += 0.010 + blocks * 1e-6 + rng.uniform(-5e-4, 5e-4)
        step(meter, 8, blocks, now)
    assert meter.itl_per_block_ms == pytest.approx(1e-3, rel=0.1)
    assert meter.itl_ms(0) == pytest.approx(10, rel=0.05)
    assert meter.itl_ms(5000) == pytest.approx(15, rel=0.05)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_growth_with_blocks(seed: int) -> None:
    """Steps of a starved process: most take 10 ms, some several times that, whatever the blocks. A slope of 1e-3 ms
    would count as a quarter of a second against a worker that holds a prompt of a thousand blocks."""
    meter, rng, now = SpeedMeter(), random.Random(seed), 0.0
    published = []
    for _ in range(30):
        blocks = rng.choice((4, 96, 100, 1000))
        for _ in range(20):
            now += 0.01 * rng.lognormvariate(0, 1)
            step(meter, 1, blocks, now)
        published.append(meter.itl_per_block_ms)
    assert sum(slope > 1e-4 for slope in published) <= 2
    assert max(published) < 5e-3


def test_equal_block_counts_tell_no_growth() -> None:
    meter, now = SpeedMeter(), 0.0
    for _ in range(400):
        now += 0.01
        step(meter, 8, 1000, now)
    assert meter.itl_per_block_ms == 0
    assert meter.itl_ms(4000) == pytest.approx(10)


def test_steps_that_prefill_idle_gaps_and_a_stopped_process_are_no_itl() -> None:
    meter = SpeedMeter()
    step(meter, 1, 10, 1.0)
    meter.submitted(1, 5000, 0, 1.0)
    step(meter, 1, 10, 2.0)  # it prefilled
    meter.first_tokens([(1, 0)], 2.0)
    step(meter, 1, 10, 3.0)  # the step before it did
    step(meter, 0, 10, 3.1)  # nothing decodes
    step(meter, 1, 10, 4.0)
    step(meter, 1, 10, 4.0 + LONG_S)
    assert meter.itl_ms(10) == 0
    step(meter, 1, 10, 4.1 + LONG_S)
    step(meter, 1, 10, 4.1 + LONG_S + SAMPLE_S / 2)  # too soon after the last sample
    assert meter.itl_ms(10) == pytest.approx(100)


def test_an_engine_that_was_emptied_prefills_nothing() -> None:
    meter = SpeedMeter()
    meter.submitted(1, 5000, 0, 0.0)
    meter.clear()
    assert meter.backlog == 0


def test_what_an_engine_fetches_by_itself_is_timed_and_old_news_fades() -> None:
    pulls = PullMeter(assumed_s=3e-6, overhead_s=0.01)
    assert pulls.token_s(0.0) == 3e-6
    pulls.begun(1, 10_000, 100.0)
    pulls.begun(2, 100, 100.0)
    pulls.begun(3, 10_000, 100.0)
    pulls.first_token(2, 101.0)  # too short to tell anything
    pulls.gone(3)
    pulls.first_token(3, 109.0)
    pulls.first_token(1, 104.01)
    assert pulls.token_s(104.01) == pytest.approx((3e-6 + 4e-4) / 2)
    pulls.begun(4, 10_000, 105.0)
    pulls.first_token(4, 109.01)
    assert 2.5e-4 < pulls.token_s(109.01) < 4e-4
    assert pulls.token_s(109.01 + 600) == pytest.approx(3e-6, rel=0.05)
