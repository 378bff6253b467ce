"""A worker's end of KV transfers over real sockets: what strangers, latecomers and liars get."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from p2pdyn.constants import REQUEST_MAX
from p2pdyn.core.types import Address, NodeId, SamplingParams
from p2pdyn.engines.base import EngineInfo, EngineOptions, Step
from p2pdyn.engines.runner import Runner, make_runner
from p2pdyn.engines.sim import SimEngine
from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets
from p2pdyn.net.transfers import Transfers
from p2pdyn.net.worker import WorkerService
from p2pdyn.transfer.choose import choose
from p2pdyn.wire.codec import decode, encode, encode_params
from p2pdyn.wire.requests import (
    KEY,
    Claim,
    Commit,
    Committed,
    Generate,
    Granted,
    Hello,
    Prefilled,
    Renew,
    Renewed,
    Return,
    Welcome,
)
from p2pdyn.wire.schema import REQUESTS

NODE, EPOCH = NodeId("a" * 16), 7
LOCAL = Address("127.0.0.1", 0)
PROMPT = array("I", [random.Random(1).randrange(97, 123) for _ in range(100)])
BLOCKS = 6
"""Full ones before the prompt's last token."""


class Owner:
    """A worker with a `sim` engine that lends its blocks."""

    def __init__(self, sockets: Sockets, folder: Path) -> None:
        self.sockets = sockets
        self.service = WorkerService(sockets, NODE, EPOCH, [LOCAL], [LOCAL])
        options = EngineOptions(None, "m", ("--speedup", "0", "--kv-blocks", "64"), True, folder, epoch=EPOCH)
        self.runner: Runner = make_runner("sim", options, self._stepped, self.service.engine_died)
        self.keys: list[bytes] = []

    def _stepped(self, step: Step) -> None:
        self.service.on_step(step)

    async def start(self) -> Owner:
        info: EngineInfo = await self.runner.start(lambda fraction, what: None)
        self.service.serve(self.runner, info, ["m"], "card")
        made = partial(choose, "tcp", self.sockets, f"{NODE}-{EPOCH}", LOCAL)
        self.service.transfers = self.transfers = Transfers(
            self.sockets, NODE, EPOCH, self.runner, info, self.service.answer, lambda node: None, made
        )
        return self

    @property
    def engine(self) -> SimEngine:
        engine = self.runner.engine  # type: ignore[attr-defined]
        assert isinstance(engine, SimEngine)
        return engine

    async def close(self) -> None:
        await self.transfers.close()
        self.service.close()
        await self.runner.close()


class Asker:
    """Whoever asks on the request link."""

    def __init__(self, sockets: Sockets, owner: Owner) -> None:
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        self.up = asyncio.Event()
        self.link = sockets.dealer(
            Address("127.0.0.1", owner.service.requests_port), self._receive, max_size=REQUEST_MAX, on_up=self.up.set
        )

    def _receive(self, frames: list[bytes]) -> None:
        self.answers.put_nowait(decode(REQUESTS, frames[0]))

    async def hello(self) -> Asker:
        await self.up.wait()
        assert type(await self.ask(Hello("f" * 16, 1))) is Welcome
        return self

    async def ask(self, message: object) -> Any:
        assert self.link.send((encode(message),))
        return await asyncio.wait_for(self.answers.get(), 5)

    def tell(self, message: object) -> None:
        assert self.link.send((encode(message),))


async def hand_over(asker: Asker) -> Prefilled:
    params = encode_params(SamplingParams(max_tokens=4, temperature=0.0))
    message = Generate(1, 0, EPOCH, "m", len(PROMPT), PROMPT.tobytes(), params, hand_over=True)
    answer = await asker.ask(message)
    assert isinstance(answer, Prefilled)
    return answer


Scenario = Callable[[Owner, Callable[[], Awaitable[Asker]]], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Scenario], None]:
    def play(scenario: Scenario) -> None:
        async def main() -> None:
            sockets = Sockets(Security.insecure())
            owner = await Owner(sockets, tmp_path).start()

            async def asker() -> Asker:
                return await Asker(sockets, owner).hello()

            try:
                await asyncio.wait_for(scenario(owner, asker), 20)
            finally:
                await owner.close()
                sockets.close()

        asyncio.run(main())

    return play


def keys_of(owner: Owner) -> bytes:
    """Of the prompt's blocks, as every engine of this model computes them."""
    names = owner.engine._names.chain("", "")
    names.extend(PROMPT.tobytes())
    return b"".join(names.keys[:BLOCKS])


def test_blocks_of_a_hand_over_are_named_read_and_proven(run: Callable[[Scenario], None]) -> None:
    async def scenario(owner: Owner, asker: Callable[[], Awaitable[Asker]]) -> None:
        frontend, borrower = await asker(), await asker()
        told = await hand_over(frontend)
        assert (told.blocks, told.epoch) == (BLOCKS, EPOCH)
        granted = await borrower.ask(Claim(1, told.lease, EPOCH, keys_of(owner)))
        assert isinstance(granted, Granted)
        assert len(granted.blocks) == len(granted.generations) == 4 * BLOCKS
        assert await borrower.ask(Renew(told.lease, EPOCH)) == Renewed(told.lease, True)
        assert await borrower.ask(Commit(2, told.lease, EPOCH)) == Committed(2, True)
        assert await borrower.ask(Commit(3, told.lease, EPOCH)) == Committed(3, False), "it has ended"
        assert owner.transfers.report()["blocks_lent"] == 0
        assert owner.engine.load_report().kv_used == 0

    run(scenario)


def test_a_worker_that_moves_nothing_holds_nothing(run: Callable[[Scenario], None]) -> None:
    async def scenario(owner: Owner, asker: Callable[[], Awaitable[Asker]]) -> None:
        frontend = await asker()
        owner.service.transfers = None  # --kv-transfer off
        told = await hand_over(frontend)
        assert (told.lease, told.blocks) == (0, 0)
        assert owner.engine.load_report().kv_used == 0

    run(scenario)


def test_another_life_of_the_worker_another_asker_and_other_keys_are_refused(run: Callable[[Scenario], None]) -> None:
    async def scenario(owner: Owner, asker: Callable[[], Awaitable[Asker]]) -> None:
        frontend, borrower, thief = await asker(), await asker(), await asker()
        told = await hand_over(frontend)
        keys = keys_of(owner)
        late = await borrower.ask(Claim(1, told.lease, EPOCH - 1, keys))
        assert not late.blocks
        assert str(EPOCH) in late.reason
        for wrong in (bytes(KEY), keys[:-1][: KEY - 1], b""):
            assert not (await borrower.ask(Claim(2, told.lease, EPOCH, wrong))).blocks
        assert (await borrower.ask(Claim(3, told.lease, EPOCH, keys))).blocks
        assert not (await thief.ask(Claim(4, told.lease, EPOCH, keys))).blocks
        assert await thief.ask(Commit(5, told.lease, EPOCH)) == Committed(5, False)
        thief.tell(Return(told.lease, EPOCH))
        assert await thief.ask(Renew(told.lease, EPOCH)) == Renewed(told.lease, False)
        assert await borrower.ask(Commit(6, told.lease, EPOCH)) == Committed(6, True), "nobody else ended it"

    run(scenario)


def test_a_cached_prefix_is_pinned_and_given_back(run: Callable[[Scenario], None]) -> None:
    async def scenario(owner: Owner, asker: Callable[[], Awaitable[Asker]]) -> None:
        frontend, borrower = await asker(), await asker()
        empty = await borrower.ask(Claim(1, 0, EPOCH, keys_of(owner)))
        assert not empty.blocks
        told = await hand_over(frontend)
        frontend.tell(Return(told.lease, EPOCH))
        granted = await borrower.ask(Claim(2, 0, EPOCH, keys_of(owner) + bytes(KEY)))
        assert len(granted.blocks) == 4 * BLOCKS, "as far as it is cached"
        assert owner.transfers.report()["blocks_lent"] == BLOCKS
        borrower.tell(Return(granted.lease, EPOCH))
        assert await borrower.ask(Renew(granted.lease, EPOCH)) == Renewed(granted.lease, False)
        assert owner.transfers.report()["blocks_lent"] == 0

    run(scenario)
