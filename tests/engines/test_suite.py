"""The conformance suite itself: what it must catch, and how it is pointed at an engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from engines.conformance.subjects import DEFAULT, ROOT, SUBJECTS, Subject, find

CAUGHT = {
    "forgetful": "test_what_is_evicted_is_told_as_removed",
    "boastful": "test_events_tell_what_a_prompt_leaves_in_the_cache",
    "stale": "test_greedy_is_the_same_again_and_from_a_warm_cache",
    "deaf": "test_an_abort_right_behind_its_submit_wins",
    "endless": "test_a_stop_token_ends_and_is_the_last",
    "hoarding": "test_tokens_are_told_as_they_come",
    "moody": "test_the_seed_decides",
    "singular": "test_it_starts_again_and_answers_the_same",
}
"""Fault of an engine in support.broken_engines, and the test that is there for it."""


def suite(*args: str) -> subprocess.CompletedProcess[str]:
    """The suite in a pytest of its own, as an engine's author runs it."""
    path = os.pathsep.join((str(ROOT / "examples" / "engine"), str(ROOT / "tests")))
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            "tests/engines/conformance",
            *args,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


def test_each_fault_is_caught_by_the_test_that_is_there_for_it() -> None:
    engines = [f"--engine=support.broken_engines:{name}" for name in CAUGHT]
    done = suite(*engines, "-k", " or ".join(CAUGHT.values()))
    failed = set(re.findall(r"(?:FAILED|ERROR) \S+::(\w+)\[(\w+)", done.stdout))
    assert {(test, name) for name, test in CAUGHT.items()} <= failed, done.stdout
    assert not failed & {("test_the_seed_decides", name) for name in CAUGHT if name not in ("moody", "stale")}


def test_the_tests_are_the_same_for_every_engine() -> None:
    done = suite("--collect-only", *(f"--engine={name}" for name in DEFAULT))
    ids = {name: set() for name in DEFAULT}  # type: dict[str, set[str]]
    for test, name in re.findall(r"^(\S+)\[(\w+)", done.stdout, re.MULTILINE):
        ids[name].add(test)
    first, *others = ids.values()
    assert len(first) > 25
    assert all(other == first for other in others)


def test_what_is_no_engine_is_refused_with_a_sentence() -> None:
    done = suite("--engine", "no_such_module:subject")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--engine: No module named 'no_such_module'" in done.stderr
    for name, reason in (("nonsense", "use one of sim"), ("support.engines:Mirror", "is a type")):
        with pytest.raises(ValueError, match=reason):
            find(name)


def test_an_environment_without_the_engine_is_an_error_not_a_skip() -> None:
    done = suite("--engine", "vllm", "--collect-only")
    if SUBJECTS["vllm"].missing:
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert "vllm is not installed" in done.stderr
    else:
        assert done.returncode == 0


def test_a_subject_names_what_it_cannot_by_known_names() -> None:
    with pytest.raises(ValueError, match="hand over"):
        Subject("mine", "mine:create", cannot={"fly": "it has no wings"})
    assert find("sim") is SUBJECTS["sim"]
