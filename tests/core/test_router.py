"""Which target takes a prompt, and that the explanation is the choice."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from dataclasses import replace
from math import isfinite

import pytest

from p2pdyn.core.admission import DEFAULT_LIMITS
from p2pdyn.core.kvhash import chain
from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.router import SESSION_MARGIN_S, Ask, Decision, Router
from p2pdyn.core.router_cost import DISK_CREDIT, HOST_CREDIT, MISS_WEIGHT, POLICIES, REQUEST_S
from p2pdyn.core.router_target import DEFAULT_TPS, Target
from p2pdyn.core.router_tell import candidates, explanation, line
from p2pdyn.core.speed import SpeedMeter
from p2pdyn.core.types import Load, NodeId
from p2pdyn.wire.kvpack import DEVICE, DISK, HOST

BLOCK = 16
PROMPT = chain(None, list(range(100)))
LOAD = Load(prefill_tps=1000.0)


class Fleet:
    """Targets that share an index, and a router over them."""

    def __init__(self, size: int, policy: str = "kv", seed: int = 1) -> None:
        self.index = KvIndex()
        self.targets = [Target(NodeId(f"{number:016x}"), slot=self.index.add()) for number in range(size)]
        self.router = Router(policy, random.Random(seed), self.index)
        for target in self.targets:
            target.report(LOAD, 0.0)

    def holds(self, number: int, blocks: int, tier: int = DEVICE) -> None:
        self.index.store(self.targets[number].slot, tier, array("Q", PROMPT[:blocks]))

    def report(self, number: int, **changes: float) -> None:
        self.targets[number].report(replace(LOAD, **changes), 0.0)  # type: ignore[arg-type]

    def ask(self, ask: Ask | None = None, now: float = 0.0) -> Decision:
        decision = self.router.choose(ask or self.prompt(), self.targets, now)
        assert decision is not None
        return decision

    @staticmethod
    def prompt(**changes: object) -> Ask:
        return replace(Ask(tokens=100 * BLOCK, hashes=PROMPT, block_size=BLOCK), **changes)  # type: ignore[arg-type]


def number(decision: Decision) -> int:
    return int(decision.target.worker, 16)


# The cost.


def test_cost_is_the_queue_and_what_is_not_cached_in_seconds() -> None:
    """Of what others hold, all but the computing is divided by the holders; what nobody holds counts once."""
    fleet = Fleet(3)
    fleet.holds(0, 90)
    fleet.holds(1, 50)
    fleet.report(0, prefill_tokens_queued=3000)
    fleet.report(1, prefill_tokens_queued=100)
    decision = fleet.ask()
    beyond = MISS_WEIGHT - 1
    assert decision.costs == pytest.approx(
        [3.0 + 0.16, 0.1 + 0.8 + beyond * 0.64, 1.6 + beyond * 0.64 + beyond / 2 * 0.8]
    )
    assert (number(decision), decision.matched, decision.uncached) == (0, 90, 160)


def test_a_hit_no_longer_than_a_templates_first_words_draws_nobody() -> None:
    fleet = Fleet(2)
    fleet.holds(0, 3)
    short = fleet.ask()
    assert short.costs[0] == short.costs[1]
    assert short.view.matched == [3, 0]
    fleet.holds(0, 4)
    assert fleet.ask().costs[0] < fleet.ask().costs[1]


def test_a_prefix_that_many_prompts_share_may_be_copied() -> None:
    fleet = Fleet(2)
    fleet.holds(0, 50)
    fleet.report(0, prefill_tokens_queued=2000)
    choices = []
    for second in range(5):
        hashes = [*PROMPT[:50], 1000 + second]
        choices.append(fleet.ask(Ask(51 * BLOCK, hashes, BLOCK), float(second)))
        fleet.report(0, prefill_tokens_queued=2000 + 1000 * (second + 1))
    dearest = [decision.costs[1] for decision in choices]
    assert [number(decision) for decision in choices[:2]] == [0, 0]
    assert dearest == pytest.approx([0.816 + (MISS_WEIGHT - 1) * 0.8 / max(1, n) for n in range(5)])
    assert number(choices[-1]) == 1


@pytest.mark.parametrize("seed", range(20))
def test_noise_in_the_speeds_of_two_equal_workers_moves_no_conversation(seed: int) -> None:
    """Each computes 3000 tokens a second and steps in 10 ms, on a host so busy that all of it takes up to ten times as
    long."""
    fleet, rng = Fleet(2), random.Random(seed)
    fleet.holds(0, 90)
    for worker in range(2):
        meter, now = SpeedMeter(), 0.0
        for request in range(8):
            meter.submitted(request, 3000, 0, now)
            now += rng.lognormvariate(0, 0.7)
            meter.first_tokens([(request, 0)], now)
            blocks = rng.choice((5, 190, 200))
            for _ in range(24):
                now += 0.01 * rng.lognormvariate(0, 1)
                took = meter.step(1, now)
                if took:
                    meter.sample(took, blocks)
        fleet.report(worker, prefill_tps=meter.prefill_tps, itl_per_block_ms=meter.itl_per_block_ms)
    assert number(fleet.ask()) == 0


def test_a_worker_that_was_found_slow_is_tried_again() -> None:
    """Nothing sent to it, nothing would ever correct it."""
    fleet = Fleet(2)
    fleet.report(0, prefill_tps=100_000.0)
    fleet.report(1, prefill_tps=1_000.0)
    assert {number(fleet.ask()) for _ in range(20)} == {0}
    slow = fleet.targets[1]
    fleet.ask(now=600.0)
    assert slow.tps == pytest.approx(50_500, rel=0.01), "as fast as the median: nobody has timed it for ten minutes"
    slow.sent("again", 1000, 10, 600.0)
    slow.report(replace(LOAD, prefill_tps=1_001.0), 600.1)
    assert slow.tps == pytest.approx(1_001)


def test_siblings_of_one_burst_do_not_make_a_prefix_shared() -> None:
    fleet = Fleet(2)
    fleet.holds(0, 50)
    for child in range(20):
        decision = fleet.ask(Ask(51 * BLOCK, [*PROMPT[:50], 1000 + child], BLOCK), child * 0.0025)
        assert decision.costs[1] == pytest.approx(0.816 + (MISS_WEIGHT - 1) * 0.8)


def test_slower_tiers_count_for_less() -> None:
    fleet = Fleet(3)
    fleet.holds(0, 50, DEVICE)
    fleet.holds(1, 50, HOST)
    fleet.holds(2, 50, DISK)
    decision = fleet.ask()
    assert decision.view.matched == [50, 50, 50]
    assert decision.view.credit == pytest.approx([50, 50 * HOST_CREDIT, 50 * DISK_CREDIT])
    assert number(decision) == 0


def test_decode_slowdown_counts_where_it_was_measured() -> None:
    fleet = Fleet(2)
    fleet.report(0, active_requests=1, active_blocks=1000, itl_per_block_ms=0.001)
    fleet.report(1, active_requests=1, active_blocks=200, itl_per_block_ms=0.001)
    decision = fleet.ask()
    assert decision.costs[0] - decision.costs[1] == pytest.approx(800 * 1e-6 * decision.view.output)
    assert number(decision) == 1


def test_open_requests_decide_between_equals() -> None:
    fleet = Fleet(2)
    fleet.report(0, active_requests=2)
    decision = fleet.ask()
    assert decision.costs[0] - decision.costs[1] == pytest.approx(2 * REQUEST_S)


def test_a_slow_worker_costs_more_and_an_unmeasured_one_counts_as_the_median() -> None:
    fleet = Fleet(3)
    fleet.report(0, prefill_tps=1000)
    fleet.report(1, prefill_tps=4000)
    fleet.report(2, prefill_tps=0)
    decision = fleet.ask()
    assert decision.costs == pytest.approx([1600 / tps for tps in (1000, 4000, 2500)])
    for target in fleet.targets:
        target.report(Load(), 0.0)
    assert fleet.ask().costs == pytest.approx([1600 / DEFAULT_TPS] * 3)


def test_dynamos_cost_in_blocks() -> None:
    fleet = Fleet(2, "kv-dynamo")
    fleet.holds(0, 60)
    fleet.report(0, prefill_tokens_queued=160, active_blocks=7)
    decision = fleet.ask()
    assert decision.costs == pytest.approx([100 + 10 - 60 + 7 + 100, 100 + 100])


def test_ties_are_broken_at_random() -> None:
    fleet = Fleet(4)
    counts = Counter(number(fleet.ask(Ask(100))) for _ in range(400))
    assert min(counts[position] for position in range(4)) > 60


# The other policies.


def test_round_robin_takes_turns_in_the_order_of_workers() -> None:
    fleet = Fleet(3, "round-robin")
    turns = [number(fleet.ask()) for _ in range(7)]
    assert [(one + 1) % 3 for one in turns[:-1]] == turns[1:]


@pytest.mark.parametrize("policy", ["least-loaded", "power-of-two"])
def test_fewest_requests(policy: str) -> None:
    fleet = Fleet(4, policy)
    for key in range(40):
        fleet.router.sent(key, fleet.ask(Ask(100)), 0.0)
    counts = [target.requests for target in fleet.targets]
    assert sum(counts) == 40
    assert max(counts) - min(counts) <= (1 if policy == "least-loaded" else 5)


def test_random_takes_all() -> None:
    fleet = Fleet(4, "random")
    assert len({number(fleet.ask()) for _ in range(100)}) == 4


# What overrides the cost.


def test_a_pin_is_obeyed_saturated_or_not() -> None:
    fleet = Fleet(3)
    fleet.report(2, prefill_tokens_queued=90_000)
    decision = fleet.ask(fleet.prompt(pin=fleet.targets[2].worker))
    assert (number(decision), decision.why) == (2, "pin")
    assert fleet.router.choose(fleet.prompt(pin="nobody"), fleet.targets, 0.0) is None


def test_workers_that_just_failed_are_left_out() -> None:
    fleet = Fleet(2)
    fleet.holds(0, 100)
    assert number(fleet.ask(fleet.prompt(exclude={fleet.targets[0].worker}))) == 1
    assert fleet.router.choose(fleet.prompt(exclude={t.worker for t in fleet.targets}), fleet.targets, 0.0) is None
    assert fleet.router.choose(fleet.prompt(), [], 0.0) is None


def test_saturated_workers_are_left_out_while_another_is_left() -> None:
    fleet = Fleet(2)
    fleet.holds(0, 100)
    fleet.report(0, queued=1000)
    assert number(fleet.ask()) == 1
    assert not fleet.router.saturated(fleet.targets, 0.0)
    fleet.report(1, prefill_tokens_queued=31_000)
    assert number(fleet.ask()) == 0
    assert fleet.router.saturated(fleet.targets, 0.0)
    assert fleet.router.clear_s(fleet.targets[1:], 0.0) == pytest.approx(1.0)
    assert not fleet.router.saturated(fleet.targets, 2.0)


def test_a_session_stays_where_it_is_unless_that_costs_too_much() -> None:
    fleet = Fleet(5)
    ask = Ask(160, session="alice")
    home = number(fleet.ask(ask))
    assert all(number(fleet.ask(ask)) == home for _ in range(20))
    fleet.report(home, prefill_tokens_queued=int(1000 * (SESSION_MARGIN_S - 0.1)))
    assert (number(fleet.ask(ask)), fleet.ask(ask).why) == (home, "session")
    fleet.report(home, prefill_tokens_queued=int(1000 * (SESSION_MARGIN_S + 0.1)))
    assert number(fleet.ask(ask)) != home


def test_a_death_moves_only_the_dead_workers_sessions() -> None:
    fleet = Fleet(5, "round-robin")
    names = [f"session {n}" for n in range(200)]
    before = {name: number(fleet.ask(Ask(160, session=name))) for name in names}
    assert min(Counter(before.values()).values()) > 20
    gone = fleet.targets.pop(2)
    for name in names:
        after = number(fleet.ask(Ask(160, session=name)))
        assert after == before[name] or before[name] == int(gone.worker, 16)


# Prompts in numbers.


def test_a_burst_of_siblings_goes_to_at_most_two_of_four_workers() -> None:
    fleet = Fleet(4)
    for target in fleet.targets:
        target.report(Load(prefill_tps=5000.0), 0.0)
    chosen = Counter[int]()
    for child in range(20):
        hashes = chain(None, [*range(250), 1000 + child, 2000 + child])
        now = child * 0.0025
        decision = fleet.ask(Ask(252 * BLOCK + 5, hashes, BLOCK), now)
        fleet.router.sent(child, decision, now)
        chosen[number(decision)] += 1
    assert len(chosen) <= 2


def test_a_refused_prompt_leaves_no_prediction() -> None:
    fleet = Fleet(2)
    decision = fleet.ask()
    fleet.router.sent("r", decision, 0.0)
    assert fleet.ask().matched == 100
    fleet.router.finished("r", 0.0)
    assert fleet.ask().matched == 0
    assert [target.queue_s(0.0) for target in fleet.targets] == [0.0, 0.0]


def test_expected_output_follows_what_answers_had() -> None:
    fleet = Fleet(1)
    for key in range(300):
        fleet.router.sent(key, fleet.ask(), 0.0)
        fleet.router.first_token(key, 0.0)
        fleet.router.finished(key, 0.0, output=40)
    assert fleet.ask().view.output == pytest.approx(40, rel=0.02)


# The explanation.


def _random_state(rng: random.Random) -> tuple[Fleet, Ask]:
    fleet = Fleet(rng.randint(1, 6), rng.choice(list(POLICIES)), rng.randrange(1 << 30))
    for position in range(len(fleet.targets)):
        if rng.random() < 0.7:
            fleet.holds(position, rng.randint(1, 100), rng.choice((DEVICE, DEVICE, HOST, DISK)))
        fleet.report(
            position,
            active_requests=rng.randint(0, 3),
            active_blocks=rng.randint(0, 500),
            queued=rng.choice((0, 0, 5, 500)),
            prefill_tokens_queued=rng.choice((0, 0, 4000, 50_000)),
            prefill_tps=rng.choice((0.0, 1000.0, 5000.0)),
            itl_per_block_ms=rng.choice((0.0, 0.01)),
        )
    for key in range(rng.randint(0, 5)):
        fleet.router.sent(key, fleet.ask(Ask(800, [*PROMPT[:40], key], BLOCK)), 0.0)
    ask = fleet.prompt(
        session=rng.choice(("", "", "alice")),
        pin=rng.choice(("", "", "", fleet.targets[0].worker)),
        exclude=rng.choice(((), (), (fleet.targets[-1].worker,))),
    )
    return fleet, ask


def test_explanation_agrees_with_the_choice_in_200_random_states() -> None:
    rng = random.Random(20)
    states = Counter[str]()
    for _ in range(200):
        fleet, ask = _random_state(rng)
        told = fleet.router.explain(ask, fleet.targets, 0.1)
        again = fleet.router.explain(ask, fleet.targets, 0.1)
        made = fleet.router.choose(ask, fleet.targets, 0.1)
        if told is None or made is None or again is None:
            assert told is made is again is None
            continue
        assert told.target is made.target is again.target
        assert candidates(told, DEFAULT_LIMITS) == candidates(made, DEFAULT_LIMITS)
        chosen = next(one for one in candidates(made, DEFAULT_LIMITS) if one.id == made.target.worker)
        assert chosen.cost == (made.cost if isfinite(made.cost) else None)
        states[chosen.state] += 1
        if made.why == "cost":
            offered = [
                one.cost
                for one in candidates(made, DEFAULT_LIMITS)
                if one.cost is not None and one.state in ("ready", chosen.state)
            ]
            assert made.cost == min(offered)
    assert states["ready"] > 100


def test_explanation_says_all_that_is_promised() -> None:
    fleet = Fleet(3, "power-of-two")
    fleet.holds(1, 30)
    fleet.report(2, prefill_tokens_queued=32_000)
    ask = fleet.prompt(exclude={fleet.targets[0].worker})
    decision = fleet.router.explain(ask, fleet.targets, 0.0)
    assert decision is not None
    told = json.loads(json.dumps(explanation(fleet.router, "m", decision), allow_nan=False))
    assert (told["model"], told["prompt_blocks"], told["policy"]) == ("m", 100, "power-of-two")
    assert told["chosen"] == fleet.targets[1].worker
    first, second, third = told["candidates"]
    assert first == {
        "id": "0" * 16, "dp_rank": 0, "matched": 0, "active_prefill_blocks": 0, "decode_blocks": 0, "cost": None,
        "state": "excluded", "role": "aggregated",
    }  # fmt: skip
    assert (second["matched"], second["state"], second["cost"]) == (30, "ready", 0.0)
    assert (third["active_prefill_blocks"], third["state"]) == (2000, "saturated")
    text = line(fleet.router, decision)
    assert "excluded" in text
    assert "\n" not in text


def test_ranks_of_one_worker_are_targets_of_their_own() -> None:
    fleet = Fleet(1)
    fleet.targets.append(Target(fleet.targets[0].worker, rank=1, slot=fleet.index.add()))
    fleet.targets[1].report(LOAD, 0.0)
    fleet.index.store(fleet.targets[1].slot, DEVICE, array("Q", PROMPT))
    decision = fleet.ask(fleet.prompt(pin=fleet.targets[0].worker))
    assert decision.target.rank == 1
