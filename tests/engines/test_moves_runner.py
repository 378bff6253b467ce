"""Moving KV blocks between engines that run where peers run them, through the memory that the peers see."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.engines import sequence
from support.moves import copy
from support.runners import Driven, run

from p2pdyn.engines.base import EngineInfo, EngineOptions, Held, Pin, Release, Reserved, Settle
from p2pdyn.engines.child import ChildRunner
from p2pdyn.engines.lending import TAG
from p2pdyn.engines.runner import InProcessRunner

SIM, BUILTIN = "p2pdyn.engines.sim", "p2pdyn.engines.builtin"
KINDS: list[tuple[Any, str]] = [(InProcessRunner, SIM), (ChildRunner, SIM), (ChildRunner, BUILTIN)]
BLOCKS = 64
PROMPT = [97 + (i * i) % 26 for i in range(41)]
EPOCH = 2**41 + 7


class Worker(Driven):
    info: EngineInfo

    @property
    def memory(self) -> memoryview:
        assert self.runner.memory is not None
        return self.runner.memory

    async def hand_over(self, key: int, prompt: list[int]) -> Held:
        self.runner.submit([replace(sequence(key, prompt), hand_over=True)])
        return await self.told(Held, key)

    async def reserve(self, key: int, prompt: list[int], **params: Any) -> Reserved:
        self.runner.submit([replace(sequence(key, prompt, **params), pull=len(prompt) // 4)])
        return await self.told(Reserved, key)

    async def nothing_is_used(self) -> None:
        while self.runner.load.active_blocks:  # noqa: ASYNC110 - a load that comes without a step is no event
            await asyncio.sleep(0.005)


Start = Callable[[], AbstractAsyncContextManager[Worker]]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1].rpartition('.')[2]}")
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Start:
    """``async with worker() as one``: started, and closed with nothing mapped any more."""
    kind, module = request.param
    args = [f"--kv-blocks={BLOCKS}", "--block-size=4", "--context=256"]
    if module == SIM:
        args.append("--speedup=0")
    options = EngineOptions("tiny" if module == BUILTIN else None, args=tuple(args), data_dir=tmp_path, epoch=EPOCH)

    @asynccontextmanager
    async def started() -> AsyncIterator[Worker]:
        one = Worker(kind, module, options)
        try:
            one.info = await one.start()
            yield one
        finally:
            await one.runner.close()
            assert one.runner.memory is None

    return started


def shared() -> list[str]:
    """Open files and mappings of this process that are an engine's memory."""
    files = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists() or entry.is_symlink()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in (*files, *maps) if "p2pdyn-kv" in line]


def test_the_answer_is_that_of_one_worker(worker: Start) -> None:
    async def check() -> None:
        async with worker() as source, worker() as target:
            source.runner.submit([sequence(1, PROMPT, max_tokens=20)])
            await source.finished(1)
            target.runner.submit([sequence(7, PROMPT[:22], max_tokens=3, cache_salt="other")])
            await target.finished(7)
            size = target.info.block_bytes
            assert size > 0
            assert len(target.memory) == BLOCKS * (size + TAG.size)

            held = await source.hand_over(2, PROMPT)
            assert (source.runner.has_work, held.cached) == (False, 40)
            for block, key, generation in zip(held.blocks, held.keys, held.generations, strict=True):
                assert TAG.unpack_from(source.memory, BLOCKS * size + block * TAG.size) == (key[:8], EPOCH, generation)
            reserved = await target.reserve(2, PROMPT, max_tokens=20)
            assert reserved.keys == held.keys
            copy(source.memory, held.blocks, target.memory, reserved.blocks, size)
            target.runner.transfer([Settle(2, 10)])
            source.runner.transfer([Release(2)])
            await target.finished(2)

            assert target.results[2].tokens == source.results[1].tokens
            assert target.results[2].cached == 40
            assert 2 not in source.results
            await source.nothing_is_used()
            await target.nothing_is_used()
            assert not any(source.memory[BLOCKS * size :])
        assert shared() == []

    run(check())


def test_an_idle_engine_answers_a_pin(worker: Start) -> None:
    async def check() -> None:
        async with worker() as one:
            held = await one.hand_over(1, PROMPT)
            one.runner.transfer([Pin(2, held.keys[:4]), Release(1)])
            pinned = await one.told(Held, 2)
            assert (pinned.blocks, pinned.generations) == (held.blocks[:4], held.generations[:4])
            one.runner.transfer([Release(2)])
            await one.nothing_is_used()

    run(check())


def test_an_aborted_sequence_keeps_what_was_reserved_until_it_is_settled(worker: Start) -> None:
    async def check() -> None:
        async with worker() as one:
            await one.reserve(1, PROMPT)
            assert one.runner.has_work
            one.runner.abort([1])
            assert not one.runner.has_work
            one.runner.submit([sequence(2, PROMPT[:9], max_tokens=3)])
            await one.finished(2)
            assert one.runner.load.active_blocks == 10
            one.runner.transfer([Settle(1, 0, over=False), Release(1)])
            await one.nothing_is_used()
            assert 1 not in one.results

    run(check())


def test_a_submit_with_its_orders_right_behind(worker: Start) -> None:
    """Order is kept: the settle comes too early and is ignored, the abort comes in time."""

    async def check() -> None:
        async with worker() as one:
            one.runner.submit([replace(sequence(1, PROMPT, max_tokens=3), pull=10)])
            one.runner.transfer([Settle(1, 10)])
            one.runner.abort([1])
            one.runner.submit([sequence(2, PROMPT, max_tokens=3)])
            await one.finished(2)
            assert (one.notes, 1 in one.results) == ([], False)

    run(check())


def test_memory_may_outlive_its_runner(worker: Start) -> None:
    async def check() -> None:
        async with worker() as one:
            held = await one.hand_over(1, PROMPT)
            size = one.info.block_bytes
            view = one.memory[held.blocks[0] * size : (held.blocks[0] + 1) * size]
            before = bytes(view)
        assert bytes(view) == before
        assert any(before)
        del view
        assert shared() == []

    run(check())


def test_a_dead_engine_s_memory_stays_until_the_runner_is_closed(tmp_path: Path) -> None:
    async def check() -> None:
        one = Worker(ChildRunner, BUILTIN, EngineOptions("tiny", args=("--kv-blocks=8",), data_dir=tmp_path))
        await one.start()
        assert isinstance(one.runner, ChildRunner)
        assert one.runner.pid is not None
        os.kill(one.runner.pid, signal.SIGKILL)
        await one.until(lambda: bool(one.deaths))
        one.runner.transfer([Release(1)])
        one.memory[0] = 1
        await one.runner.close()
        assert (one.runner.memory, shared()) == (None, [])

    run(check())


def test_without_shared_memory_the_engine_runs_and_shows_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str) -> int:
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr("os.memfd_create", refuse)

    async def check() -> None:
        one = Worker(ChildRunner, BUILTIN, EngineOptions("tiny", args=("--kv-blocks=8",), data_dir=tmp_path))
        info = await one.start()
        one.runner.submit([sequence(1, PROMPT, max_tokens=3)])
        await one.finished(1)
        assert (info.block_bytes, one.runner.memory) == (0, None)
        await one.runner.close()

    run(check())
    assert "can not be moved" in caplog.text


def test_an_engine_that_shows_no_memory_costs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))

    async def check() -> None:
        one = Driven(ChildRunner, "support.faulty_engine", EngineOptions(data_dir=tmp_path))
        info = await one.start()
        assert (info.block_bytes, one.runner.memory, shared()) == (0, None, [])
        await one.runner.close()

    run(check())
