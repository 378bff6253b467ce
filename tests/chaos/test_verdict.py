"""Which failed attempts are held against the cluster."""

from __future__ import annotations

import pytest
from chaos.client import Attempt
from chaos.verdict import GRACE_S, Trouble, lost

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
