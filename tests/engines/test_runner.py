"""Driving engines from an event loop: in the peer itself, and in the host child with everything that can befall it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.engines import Result, generate, sequence
from support.runners import Driven, run

from p2pdyn.engines.base import EngineError, EngineOptions
from p2pdyn.engines.child import ChildRunner
from p2pdyn.engines.frames import (
    LOAD,
    PROGRESS,
    STEP,
    FrameBuffer,
    FrameError,
    frame,
    pack_sequence,
    unpack_sequence,
)
from p2pdyn.engines.runner import InProcessRunner, make_runner
from p2pdyn.engines.sim import create

SIM, FAULTY = "p2pdyn.engines.sim", "support.faulty_engine"
TESTS = Path(__file__).parents[1]

Drive = Callable[..., Any]


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drive:
    """``async with drive(kind, module, *args) as driven``: started, and closed with no process left."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))

    @asynccontextmanager
    async def started(
        kind: type[ChildRunner] | type[InProcessRunner], module: str, *args: str
    ) -> AsyncIterator[Driven]:
        driven = Driven(kind, module, EngineOptions(args=args, data_dir=tmp_path))
        try:
            await driven.start()
            yield driven
        finally:
            await driven.runner.close()
            if isinstance(driven.runner, ChildRunner) and driven.runner.pid is not None:
                assert not group_lives(driven.runner.pid)

    return started


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def group_lives(group: int) -> bool:
    return any(
        lives(int(entry.name)) and _group_of(int(entry.name)) == group
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
    )


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - neither a file nor another process has an event
        await asyncio.sleep(0.005)


def prompt(seed: int) -> list[int]:
    return [97 + (seed * 7 + i) % 26 for i in range(20 + seed % 30)]


both = pytest.mark.parametrize("kind", [InProcessRunner, ChildRunner])


@both
def test_a_runner_gives_the_engine_s_own_tokens(drive: Drive, kind: Any) -> None:
    args = ("--speedup=0", "--block-size=4", "--kv-blocks=64", "--max-num-seqs=5", "--context=256")
    jobs = [
        sequence(key, prompt(key), max_tokens=15, temperature=key % 2, seed=key, logprobs=key % 3 or None)
        for key in range(16)
    ]
    direct = create(EngineOptions(args=args))
    direct.load(lambda fraction, what: None)
    expected = generate(direct, *(sequence(j.key, j.tokens, **_params(j)) for j in jobs))

    async def check() -> None:
        async with drive(kind, SIM, *args) as driven:
            driven.runner.submit(jobs)
            assert driven.runner.has_work
            await driven.finished(*range(16))
            assert not driven.runner.has_work
            for key, result in expected.items():
                got = driven.results[key]
                assert (got.tokens, got.finish, got.logprobs) == (result.tokens, result.finish, result.logprobs)
            assert driven.runner.load.active_requests == 0
            assert driven.runner.load.kv_total == 64

    run(check())


def _params(job: Any) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "seed", "logprobs")
    return {name: getattr(job.params, name) for name in names}


@both
def test_a_prefix_hit_is_told(drive: Drive, kind: Any) -> None:
    async def check() -> None:
        async with drive(kind, SIM, "--speedup=0", "--block-size=4") as driven:
            for key in (0, 1):
                driven.runner.submit([sequence(key, prompt(0), max_tokens=3)])
                await driven.finished(key)
            assert [driven.results[key].cached for key in (0, 1)] == [0, 16]

    run(check())


@both
def test_an_abort_right_behind_its_submit_wins(drive: Drive, kind: Any) -> None:
    async def check() -> None:
        async with drive(kind, FAULTY) as driven:
            for key in range(0, 100, 2):
                driven.runner.submit([sequence(key, [1], max_tokens=10**9)])
                driven.runner.abort([key])
                driven.runner.submit([sequence(key + 1, [1], max_tokens=3)])
            await driven.finished(*range(1, 100, 2))
            assert sorted(driven.results) == list(range(1, 100, 2))
            assert not driven.runner.has_work
            await wait_until(lambda: driven.runner.load.active_requests == 0)

    run(check())


@both
def test_nothing_comes_after_an_abort(drive: Drive, kind: Any) -> None:
    async def check() -> None:
        async with drive(kind, FAULTY, "slow") as driven:
            driven.runner.submit([sequence(key, [1], max_tokens=10**9) for key in (1, 2)])
            await driven.until(lambda: len(driven.results.get(1, Result()).tokens) > 2)
            driven.runner.abort([1, 77])
            had = list(driven.results[1].tokens)
            at = len(driven.results[2].tokens)
            await driven.until(lambda: len(driven.results[2].tokens) > at + 10)
            assert driven.results[1].tokens == had
            driven.runner.abort([2])

    run(check())


@both
def test_a_thousand_sequences(drive: Drive, kind: Any) -> None:
    async def check() -> None:
        async with drive(kind, SIM, "--speedup=0") as driven:
            driven.runner.submit([sequence(key, prompt(key), max_tokens=5) for key in range(1000)])
            await driven.finished(*range(1000))
            assert {len(result.tokens) for result in driven.results.values()} == {5}

    run(check())


@pytest.mark.alone
@both
def test_the_loop_serves_others_between_steps(drive: Drive, kind: Any) -> None:
    """A timer of 1 ms fires hundreds of times while an engine without waits runs thousands of steps."""

    async def check() -> None:
        async with drive(kind, SIM, "--speedup=0", "--context=100000") as driven:
            driven.runner.submit([sequence(key, prompt(key), max_tokens=3000) for key in range(4)])
            turns, worst, last = 0, 0.0, time.monotonic()
            while not all(key in driven.results and driven.results[key].finish for key in range(4)):
                await asyncio.sleep(0.001)
                now = time.monotonic()
                turns, worst, last = turns + 1, max(worst, now - last), now
            assert driven.runner.steps >= 3000
            assert turns > 20
            assert worst < 0.25

    run(check())


@pytest.mark.alone
def test_steps_come_when_they_are_due(drive: Drive) -> None:
    async def check() -> None:
        async with drive(InProcessRunner, SIM, "--itl-ms=20", "--prefill-tps=1e6") as driven:
            began = time.monotonic()
            driven.runner.submit([sequence(0, prompt(0), max_tokens=11)])
            await driven.finished(0)
            assert 0.195 <= time.monotonic() - began < 1.0

    run(check())


@both
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("bad-argument", "argument bad-argument is bad: leave it out"),
        ("load-error", "the weights are missing: name another --model"),
    ],
)
def test_an_engine_that_cannot_load_says_why(drive: Drive, kind: Any, fault: str, says: str) -> None:
    async def check() -> None:
        with pytest.raises(EngineError) as raised:
            async with drive(kind, FAULTY, fault):
                raise AssertionError("it started")
        assert str(raised.value) == says

    run(check())


@both
@pytest.mark.parametrize(
    ("fault", "says", "traceback"),
    [
        ("step-error", "the device is gone: restart the host", False),
        ("step-bug", "engine tested failed: ZeroDivisionError: by nought", True),
    ],
)
def test_an_exception_in_a_step_is_told_once(
    drive: Drive, kind: Any, fault: str, says: str, traceback: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    async def check() -> None:
        async with drive(kind, FAULTY, fault) as driven:
            driven.runner.submit([sequence(0, [1])])
            await driven.until(lambda: bool(driven.deaths))
            driven.runner.submit([sequence(1, [1])])  # nobody is there any more
            driven.runner.abort([0, 1])
            assert not driven.runner.has_work
        assert driven.deaths == [says]

    run(check())
    assert ("Traceback" in capfd.readouterr().err) == traceback


# ---- the child alone


def test_loading_reports_progress_and_stdout_stays_clean(drive: Drive, capfd: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        async with drive(ChildRunner, FAULTY) as driven:
            assert driven.progress == [0.0, 0.25, 0.5, 0.75]

    run(check())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "loaded" in captured.err


def test_a_bug_while_loading_is_told_with_its_traceback(drive: Drive, capfd: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        with pytest.raises(EngineError, match="engine tested failed: ZeroDivisionError: by nought"):
            async with drive(ChildRunner, FAULTY, "load-bug"):
                raise AssertionError("it started")

    run(check())
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.alone
def test_a_killed_child_is_noticed_at_once(drive: Drive) -> None:
    async def check() -> None:
        async with drive(ChildRunner, FAULTY, "slow") as driven:
            driven.runner.submit([sequence(0, [1], max_tokens=10**9)])
            await driven.until(lambda: bool(driven.results))
            began = time.monotonic()
            os.kill(driven.runner.pid, signal.SIGKILL)
            await driven.until(lambda: bool(driven.deaths))
            assert time.monotonic() - began < 0.2
            assert "SIGKILL" in driven.deaths[0]
        assert len(driven.deaths) == 1

    run(check())


def test_a_child_that_exits_is_told_with_its_code(drive: Drive) -> None:
    async def check() -> None:
        async with drive(ChildRunner, FAULTY, "exit") as driven:
            driven.runner.submit([sequence(0, [1])])
            await driven.until(lambda: bool(driven.deaths))
        assert driven.deaths == ["the engine process exited with code 3"]

    run(check())


def test_a_dying_child_takes_what_it_started_along(drive: Drive, tmp_path: Path) -> None:
    async def check() -> None:
        async with drive(ChildRunner, FAULTY, "grandchild") as driven:
            grandchild = int((tmp_path / "grandchild").read_text())
            assert lives(grandchild)
            os.kill(driven.runner.pid, signal.SIGKILL)
            await driven.until(lambda: bool(driven.deaths))
            await wait_until(lambda: not lives(grandchild))

    run(check())


@pytest.mark.alone
def test_close_lets_the_engine_close(drive: Drive, tmp_path: Path) -> None:
    async def check() -> None:
        async with drive(ChildRunner, FAULTY, "close-told") as driven:
            began = time.monotonic()
            await driven.runner.close()
            await driven.runner.close()
            assert time.monotonic() - began < 1.0
        assert driven.deaths == []

    run(check())
    assert (tmp_path / "closed").exists()


def test_close_ends_an_engine_that_hangs_and_ignores_sigterm(
    drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pdyn.engines.child.TERM_S", 0.1)

    async def check() -> None:
        async with drive(ChildRunner, FAULTY, "hang") as driven:
            driven.runner.submit([sequence(0, [1])])
            await wait_until((tmp_path / "hanging").exists)
            assert driven.runner.has_work
            assert driven.runner.steps == 0
            await driven.runner.close(ask=0.1)
            assert driven.deaths == []

    run(check())


def test_cancelling_the_start_leaves_no_process(drive: Drive, tmp_path: Path) -> None:
    async def check() -> None:
        driven = Driven(ChildRunner, FAULTY, EngineOptions(args=("load-long",), data_dir=tmp_path))
        task = asyncio.create_task(driven.start())
        await wait_until((tmp_path / "loading").exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert isinstance(driven.runner, ChildRunner)
        assert driven.runner.pid is not None
        assert not group_lives(driven.runner.pid)
        await driven.runner.close()

    run(check())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x05\x00\x00\x00junk!", id="not msgpack"),
        pytest.param(b"\xff\xff\xff\xff", id="too large"),
        pytest.param(frame([9, 1]), id="unknown kind"),
        pytest.param(frame([]), id="empty"),
        pytest.param(frame(7), id="no array"),
        pytest.param(frame([STEP, [1], [], [], [], [], []]), id="step of uneven columns"),
        pytest.param(frame([STEP, 1]), id="short step"),
        pytest.param(frame([LOAD, [0] * 20]), id="long load"),
        pytest.param(frame([PROGRESS, "half", 1]), id="progress of wrong types"),
    ],
)
def test_a_child_that_writes_nonsense_is_ended(drive: Drive, data: bytes) -> None:
    async def check() -> None:
        async with drive(ChildRunner, FAULTY) as driven:
            driven.runner.on_data(data)
            await driven.until(lambda: bool(driven.deaths))
            assert "no frame" in driven.deaths[0]

    run(check())


PARENT = """
import asyncio, sys
from pathlib import Path
from p2pdyn.engines.base import EngineOptions
from p2pdyn.engines.child import ChildRunner

async def main():
    options = EngineOptions(args=(sys.argv[1],), data_dir=Path(sys.argv[2]))
    runner = ChildRunner("tested", "support.faulty_engine", options, print, print)
    start = asyncio.ensure_future(runner.start(lambda *told: None))
    if sys.argv[1] == "grandchild":
        await start
    else:
        while not Path(sys.argv[2], "loading").exists():
            await asyncio.sleep(0.01)
    print(runner.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("fault", ["grandchild", "load-long"])
def test_nothing_survives_the_peer(fault: str, tmp_path: Path) -> None:
    """Killed without a chance to say so: idle with a grandchild that ignores SIGTERM, and amid loading."""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, fault, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert lives(child)
        parent.kill()

    wait_for(lambda: not group_lives(child), 3.0)


# ---- frames, registry


def test_a_sequence_reaches_the_child_whole() -> None:
    sent = replace(sequence(7, [1, 2], [3], max_tokens=9, seed=-1, stop_token_ids=(4,)), traceparent="00-a-b-01")
    (content,) = FrameBuffer().feed(frame(pack_sequence(sent)))
    assert unpack_sequence(content) == sent


def test_frames_are_cut_wherever_the_stream_breaks() -> None:
    contents = [[1, "a" * 300], [2], [3, [4, {"five": 6}]]]
    stream = b"".join(frame(content) for content in contents)
    for size in (1, 3, 7, 200, len(stream)):
        buffer = FrameBuffer()
        got = [c for start in range(0, len(stream), size) for c in buffer.feed(stream[start : start + size])]
        assert got == contents


def test_a_frame_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match="larger than"):
        list(FrameBuffer().feed(b"\xff\xff\xff\x7f"))


def test_an_unknown_engine_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="engine 'warp' is not known: use one of sim"):
        make_runner("warp", EngineOptions(data_dir=tmp_path), print, print)
