from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from p2pdyn.core.types import Address
from p2pdyn.net import seeds as module
from p2pdyn.net.seeds import Seeds, parse_seeds, resolve


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESOLVE_S", 0.05)
    monkeypatch.setattr(module, "RETRY_MIN_S", 0.01)
    monkeypatch.setattr(module, "FILE_POLL_S", 0.01)


@contextlib.contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], list[str]]) -> Iterator[None]:
    """A resolver in place of the system's: names outside this host are not ours to ask."""

    async def getaddrinfo(self: object, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (ip, port)) for ip in answer(host)]

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
        yield


class Heard:
    """Collects introductions; ``until`` waits for a condition on them while the seeds run."""

    def __init__(self) -> None:
        self.addresses: list[Address] = []
        self._news = asyncio.Event()

    def __call__(self, address: Address) -> None:
        self.addresses.append(address)
        self._news.set()

    async def until(self, condition: Callable[[list[Address]], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition(self.addresses):
                self._news.clear()
                await self._news.wait()


@contextlib.asynccontextmanager
async def running(seeds: Seeds) -> AsyncIterator[None]:
    task = asyncio.create_task(seeds.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1:7400", Address("10.0.0.1", 7400)),
        ("[fd00::1]:7401", Address("fd00::1", 7401)),
        ("node-a.lab:7402  # rack 3", Address("node-a.lab", 7402)),
        ("node-a", Address("node-a", 7400)),
        ("fd00::1", Address("fd00::1", 7400)),
    ],
)
def test_a_line(text: str, expected: Address) -> None:
    assert parse_seeds([text], "f") == ([expected], [])


def test_comments_blank_lines_and_repetitions_are_left_out() -> None:
    found, errors = parse_seeds(["# hosts", "", "a:1", "  ", "b:2", "a:1"], "f")
    assert (found, errors) == ([Address("a", 1), Address("b", 2)], [])


@pytest.mark.parametrize("line", ["a:70000", "a:b", "[::1", "a b:1", ":7400", "a:0"])
def test_a_bad_line_names_file_and_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "seeds.txt"
    path.write_text(f"good:1\n{line}\n")
    with pytest.raises(ValueError, match=r"seeds\.txt, line 2: .*(write|HOST|form)"):
        Seeds([], path, print)


def test_a_missing_file_is_an_error_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt cannot be read .*HOST:PORT"):
        Seeds([], tmp_path / "none.txt", print)


def test_literals_are_introduced_again_and_again() -> None:
    async def scenario() -> None:
        heard = Heard()
        async with running(Seeds(["127.0.0.1:1", "[::1]:2"], None, heard)):
            await heard.until(lambda a: a.count(Address("127.0.0.1", 1)) >= 3 and a.count(Address("::1", 2)) >= 3)

    asyncio.run(scenario())


def test_localhost_resolves_through_the_system() -> None:
    assert Address("127.0.0.1", 9) in asyncio.run(resolve(Address("localhost", 9)))


def test_a_name_is_resolved_again_and_all_its_addresses_count(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"n": ["10.0.0.1", "fd00::1"]}

    async def scenario() -> None:
        heard = Heard()
        async with running(Seeds(["n:1"], None, heard)):
            await heard.until(lambda a: a[:2] == [Address("10.0.0.1", 1), Address("fd00::1", 1)])
            answers["n"] = ["10.0.0.9"]
            await heard.until(lambda a: Address("10.0.0.9", 1) in a)

    with answering(monkeypatch, lambda host: answers[host]):
        asyncio.run(scenario())


def test_a_name_that_fails_is_tried_for_ever_and_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def answer(host: str) -> list[str]:
        calls.append(host)
        if len(calls) < 6:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ["10.0.0.1"]

    async def scenario() -> None:
        heard = Heard()
        async with running(Seeds(["later:1", "10.0.0.2:1"], None, heard)):
            await heard.until(lambda a: Address("10.0.0.1", 1) in a)
        assert heard.addresses[0] == Address("10.0.0.2", 1)  # one bad name does not hold up the others

    caplog.set_level(logging.INFO, "p2pdyn")
    with answering(monkeypatch, answer):
        asyncio.run(scenario())
    messages = [r.getMessage() for r in caplog.records if r.name == "p2pdyn.net.seeds"]
    assert len(messages) == 2
    assert "later:1 does not resolve" in messages[0]
    assert "resolves again" in messages[1]


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "seeds"
    path.write_text("127.0.0.1:1\n")

    async def scenario() -> None:
        heard = Heard()
        seeds = Seeds(["127.0.0.1:9"], path, heard)
        async with running(seeds):
            await heard.until(lambda a: Address("127.0.0.1", 1) in a)
            replacement = tmp_path / "new"
            replacement.write_text("127.0.0.1:2\nbad line\n")
            os.replace(replacement, path)
            await heard.until(lambda a: Address("127.0.0.1", 2) in a)
            assert seeds.seeds == [Address("127.0.0.1", 9), Address("127.0.0.1", 2)]
            path.unlink()
            seen = len(heard.addresses)
            await heard.until(lambda a: a[seen:].count(Address("127.0.0.1", 2)) >= 2)

    asyncio.run(scenario())
    assert "line 2" in caplog.text
    assert "cannot be read" in caplog.text  # and a file that vanished took no seed away
