"""The whole list of hostile inputs, with smaller floods, against three real processes; `scripts/hostile` is the long
form and prints the table of docs/reliability.md."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator

import pytest
from support import hostile_http, hostile_wire
from support.hostile import AGAIN_MB, API_KEY, Case, Range, attacked

CASES = [*hostile_http.cases(), *hostile_wire.cases()]
GROUPS = sorted({case.group for case in CASES if not case.slow})
SLOW = [case for case in CASES if case.slow]


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Range]:
    with attacked(tmp_path_factory.mktemp("hostile"), 0.05) as found:
        before = found.held()
        yield found
        assert found.left_behind(before) == ""


def bad(field: Range, cases: list[Case]) -> list[str]:
    return [
        f"{outcome.case.name}: {outcome.answer}, not {outcome.case.wanted} {outcome.undisturbed}"
        for outcome in field.run(cases)
        if not outcome.good
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_each_input_gets_its_documented_answer_and_disturbs_nobody(field: Range, group: str) -> None:
    assert bad(field, [case for case in CASES if case.group == group and not case.slow]) == []


def test_those_who_take_their_time_are_cut_off_side_by_side(field: Range) -> None:
    assert bad(field, SLOW) == []


def test_what_is_large_leaves_nothing_the_second_time(field: Range) -> None:
    before = field.held()
    assert bad(field, [case for case in CASES if case.heavy]) == []
    assert field.left_behind(before, AGAIN_MB) == ""


def test_what_was_refused_is_counted_by_kind(field: Range) -> None:
    """Runs last, so that each kind has occurred."""
    asked = urllib.request.Request(f"{field.frontend.url}/metrics", headers={"Authorization": f"Bearer {API_KEY}"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        counted = dict(re.findall(r'mesh_events_total{event="([\w-]+)"} (\S+)', answer.read().decode()))
    for kind in ("refused-key", "bad-handshake", "abandoned-handshake", "bad-message", "future-version"):
        assert float(counted.get(kind, 0)) > 0, kind
