"""The faults of a soak: reproducible, in time, and never so many that nobody could serve."""

from __future__ import annotations

import pytest
from chaos.cluster import FRONTENDS, WORKERS
from chaos.schedule import ENDS_A_PROCESS, WORKER_KINDS, Fault, schedule

SECONDS = 600.0
ANCHORS = ("f0", "w0")


def made(seed: int, **more: object) -> list[Fault]:
    return schedule(seed, SECONDS, frontends=FRONTENDS, workers=WORKERS, anchors=ANCHORS, **more)  # type: ignore[arg-type]


def test_the_same_seed_makes_the_same_faults_and_another_seed_others() -> None:
    assert made(7) == made(7)
    assert made(7) != made(8)


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_is_always_spared_and_no_peer_has_two_faults_at_once(seed: int) -> None:
    faults = made(seed)
    assert len(faults) > SECONDS / 5 * 0.6
    assert max(fault.until for fault in faults) < SECONDS
    for fault in faults:
        others = [other for other in faults if other is not fault and other.at <= fault.at < other.until]
        victims = [fault.victim, *(other.victim for other in others)]
        assert len(set(victims)) == len(victims)
        assert sum(victim in WORKERS for victim in victims) <= 2
        assert sum(victim in FRONTENDS for victim in victims) <= 1
        assert not (others and "split" in (fault.kind, *(other.kind for other in others)))
        assert not (fault.kind in ENDS_A_PROCESS and fault.victim in ANCHORS)
        if fault.kind == "split":
            near = {*FRONTENDS, *WORKERS} - set(fault.others)
            assert (len(near), len(near & set(FRONTENDS))) == (3, 1)
            assert fault.victim in near


def test_every_kind_comes_up_and_kinds_can_be_left_out() -> None:
    many = [fault.kind for seed in range(20) for fault in made(seed)]
    assert set(many) == set(WORKER_KINDS)
    assert "clock" not in {fault.kind for seed in range(5) for fault in made(seed, without=("clock",))}
