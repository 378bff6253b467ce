"""``pytest tests/engines/conformance --engine NAME``: one engine, or several; without it those that run anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from engines.conformance import subjects
from engines.conformance.bench import Bench, Driven
from engines.conformance.subjects import Subject

CHOSEN = pytest.StashKey[list[Subject]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    known = ", ".join((*subjects.SUBJECTS, *subjects.ELSEWHERE))
    parser.addoption(
        "--engine",
        action="append",
        default=[],
        metavar="NAME",
        help=f"what is tested: {known}, or MODULE:SUBJECT",
    )


def pytest_configure(config: pytest.Config) -> None:
    names = config.getoption("--engine", None) or subjects.DEFAULT
    try:
        chosen = [subjects.find(name) for name in names]
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--engine: {error}") from error
    for subject in chosen:
        if subject.missing:
            raise pytest.UsageError(f"--engine {subject.name}: {subject.missing}")
    config.stash[CHOSEN] = chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        params = [
            pytest.param(subject, id=subject.name, marks=pytest.mark.timeout(subject.start_s + 4 * subject.patience_s))
            for subject in metafunc.config.stash[CHOSEN]
        ]
        metafunc.parametrize("subject", params, indirect=True, scope="session")


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.param
    return found


@pytest.fixture(scope="session")
def bench(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(subject, tmp_path_factory.mktemp(subject.name))
    yield made
    made.close()


@pytest.fixture(scope="session")
def aggregated(request: pytest.FixtureRequest, bench: Bench) -> Driven:
    """Loading is what takes long: one for all tests. Those that hand over load while this one is tested."""
    (engine,) = bench.start("aggregated")
    if "hand over" not in bench.subject.cannot and any("pair" in wanted(item) for item in request.session.items):
        bench.begin("prefill", "decode")
    return engine


def wanted(item: pytest.Item) -> Sequence[str]:
    fixtures: Sequence[str] = getattr(item, "fixturenames", ())
    return fixtures


@pytest.fixture
def engine(aggregated: Driven) -> Iterator[Driven]:
    """An idle engine that lives, and is idle again after the test."""
    assert not aggregated.deaths, f"it died in an earlier test: {aggregated.deaths[0]}"
    yield aggregated
    if not aggregated.deaths:
        aggregated.nothing_is_used()
