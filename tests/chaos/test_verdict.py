"""What is held against the cluster: failed attempts, and growth of its processes."""

from __future__ import annotations

import random

import pytest
from chaos.client import Attempt
from chaos.verdict import (
    DESCRIPTOR_SLACK,
    GRACE_S,
    GROWTH_SPAN_S,
    RSS_LIMIT,
    WARM_UP_S,
    Growth,
    Sample,
    Trouble,
    descriptors_grown,
    growth,
    lost,
)

WORKERS = ("w0", "w1")


def attempt(began: float, ended: float, why: str = "503") -> Attempt:
    return Attempt("f0", began, ended, why=why)


def at(began: float, ended: float, *peers: str) -> Trouble:
    return Trouble("it", began, frozenset(peers), ended=ended)


def between(began: float, ended: float, *pairs: tuple[str, str]) -> Trouble:
    return Trouble("it", began, links=frozenset(map(frozenset, pairs)), ended=ended)


def test_a_right_answer_is_never_lost_and_a_failure_without_a_fault_always_is() -> None:
    assert not lost(attempt(0, 1, why=""), [], WORKERS)
    assert lost(attempt(0, 1), [], WORKERS)


@pytest.mark.parametrize(
    ("troubles", "expected"),
    [
        ([at(1, 2, "w0")], True),  # the other could serve
        ([at(1, 4, "w0"), at(3, 5, "w1")], False),  # nobody could from 3 to 4
        ([at(1, 2, "w0"), at(2 + GRACE_S, 5, "w1")], True),  # one was back when the other went
        ([at(1, 2, "w0"), at(2 + GRACE_S / 2, 5, "w1")], False),  # only just back
        ([at(-9, -GRACE_S - 0.1, "w0", "w1")], True),  # long over
        ([at(-9, -GRACE_S / 2, "w0", "w1")], False),
        ([at(7, 8, "w0", "w1")], True),  # after the failure
        ([at(5, 6, "f0")], False),  # its own frontend
        ([at(5, 6, "f1")], True),  # another's
        ([between(1, 5, ("f0", "w0"), ("f0", "w1"))], False),
        ([between(1, 5, ("f1", "w0"), ("f1", "w1"))], True),
        ([between(1, 5, ("w0", "f0")), at(2, 3, "w1")], False),
    ],
)
def test_a_failure_is_lost_if_a_healthy_worker_could_be_reached_at_each_moment(
    troubles: list[Trouble], expected: bool
) -> None:
    assert lost(attempt(0, 6), troubles, WORKERS) is expected


def life(seconds: float, leak_mb: float = 0.0, *, descriptors_leak: float = 0.0, seed: int = 1) -> Growth | None:
    """A sample a second as soaks have them: a start that grows fast, steps of the allocator, a spike now and then, and
    descriptors that go when a link is down. Leaks are a minute's."""
    rng = random.Random(seed)
    samples = []
    for second in range(round(seconds)):
        start = 8.0 * min(1.0, second / 60)
        noise = rng.choice((0.0, 0.25, 0.5)) + (6.0 if rng.random() < 0.02 else 0.0)
        rss = 50.0 + start + noise + leak_mb * second / 60
        links = rng.choice((0, 0, 8, 30))
        descriptors = 92 - links + round(descriptors_leak * second / 60)
        samples.append(Sample(1000.0 + second, round(rss * 1e6), descriptors, 10))
    return growth(samples)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("seconds", [WARM_UP_S + GROWTH_SPAN_S + 5, 300, 600])
def test_a_noisy_life_that_is_flat_passes(seconds: float, seed: int) -> None:
    flat = life(seconds, 0.3, seed=seed)
    assert flat is not None
    assert flat.seconds >= GROWTH_SPAN_S
    assert flat.rss_mb_a_minute == pytest.approx(0.3, abs=0.3)
    assert not flat.too_much


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("seconds", [WARM_UP_S + GROWTH_SPAN_S + 5, 300, 600])
def test_a_leak_under_the_same_noise_is_caught(seconds: float, seed: int) -> None:
    leaking = life(seconds, 2.0, seed=seed)
    assert leaking is not None
    assert leaking.rss_mb_a_minute > RSS_LIMIT
    assert leaking.too_much


def test_a_short_life_says_nothing_and_one_hardly_longer_is_not_judged() -> None:
    assert life(WARM_UP_S + 30, 100.0) is None
    hardly = life(WARM_UP_S + GROWTH_SPAN_S - 10, 100.0)
    assert hardly is not None
    assert hardly.rss_mb_a_minute == pytest.approx(100, rel=0.05)
    assert not hardly.too_much
    assert growth([]) is None


@pytest.mark.parametrize(("leak", "stated"), [(0.0, 0.0), (10.0, 10.0)])
def test_links_that_are_down_now_and_then_do_not_hide_a_leak_of_descriptors(leak: float, stated: float) -> None:
    grown = life(600, descriptors_leak=leak)
    assert grown is not None
    assert grown.descriptors_a_minute == pytest.approx(stated, abs=0.5)


def test_descriptors_at_rest_may_be_those_of_links_that_stay_open() -> None:
    assert not descriptors_grown(61, 61 + DESCRIPTOR_SLACK)
    assert descriptors_grown(61, 62 + DESCRIPTOR_SLACK)
