"""KV streams over real sockets: a `sim` worker's cache, and what a frontend comes to believe of it."""

from __future__ import annotations

import asyncio
import itertools
import random
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.engine_publisher import EnginePublisher

from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.kvstream import DIGEST_S, EXACT, REPLAY, SNAPSHOT, STALE_S
from p2pdyn.core.types import Address, NodeId, SamplingParams
from p2pdyn.engines.base import BlocksRemoved, BlocksStored, EngineInfo, EngineOptions, Sequence, Step
from p2pdyn.engines.runner import Runner, make_runner
from p2pdyn.net.curve import Security, write_key_file
from p2pdyn.net.kv_feed import KvFeed
from p2pdyn.net.kv_source import BATCH_S
from p2pdyn.net.sockets import Sockets
from p2pdyn.net.worker import WorkerService
from p2pdyn.net.worker_link import WorkerLink
from p2pdyn.wire.events import TOPIC_DIGEST, TOPIC_KV
from p2pdyn.wire.requests import CHUNK, Fetch, Hello

LOCAL = Address("127.0.0.1", 0)
WORKER, FRONTEND = NodeId("a" * 16), NodeId("f" * 16)
EPOCH = 7


class Bench:
    """A worker with its engine, and frontends that follow it. ``drop`` decides which published messages are lost."""

    def __init__(self, sockets: Sockets, tmp: Path, *args: str) -> None:
        self.sockets = sockets
        self.service = WorkerService(sockets, WORKER, EPOCH, [LOCAL], [LOCAL])
        options = EngineOptions(None, "m", ("--speedup", "0", *args), True, tmp)
        self.runner: Runner = make_runner("sim", options, self.service.on_step, self.service.engine_died)
        self.info: EngineInfo
        self.keys = itertools.count(1)
        self.links: list[WorkerLink] = []
        self.feeds: list[KvFeed] = []
        self.drop: Callable[[bytes], bool] = lambda topic: False
        events = self.service._events
        send = events.send
        events.send = lambda frames: self.drop(frames[0]) or send(frames)  # type: ignore[method-assign]

    def follow(self) -> KvFeed:
        feed = KvFeed(KvIndex(), lambda key, slot: None)
        requests, events = (Address("127.0.0.1", p) for p in (self.service.requests_port, self.service.events_port))
        link = WorkerLink(
            self.sockets, Hello(FRONTEND, 1), WORKER, EPOCH, requests, events,
            on_up=lambda link: feed.up(link, 1), on_down=lambda link, reason: feed.lost(WORKER),
            on_message=lambda link, message: None, on_load=lambda worker, rank, load: None, batch_done=lambda: None,
            on_kv=feed.received, take_kv=feed.take,
        )  # fmt: skip
        self.links.append(link)
        self.feeds.append(feed)
        return feed

    def run(self, prompt: bytes) -> None:
        tokens = array("I", prompt)
        self.runner.submit([Sequence(next(self.keys), tokens, len(tokens), SamplingParams(max_tokens=4, seed=1))])

    @property
    def truth(self) -> set[tuple[int, int]]:
        assert self.service.kv is not None
        return self.service.kv.journals[0].held()

    def believed(self, feed: KvFeed) -> set[tuple[int, int]]:
        (stream,) = feed.of(WORKER)
        return set() if stream.slot is None else feed.index.held(stream.slot)

    def exact(self, feed: KvFeed) -> bool:
        return [stream.state for stream in feed.of(WORKER)] == [EXACT]

    def right(self, feed: KvFeed) -> bool:
        return self.exact(feed) and self.believed(feed) == self.truth

    async def close(self) -> None:
        for feed in self.feeds:
            feed.close()
        for link in self.links:
            link.close()
        self.service.close()
        await self.runner.close()


@asynccontextmanager
async def bench(tmp: Path, *args: str) -> AsyncIterator[Bench]:
    write_key_file(tmp / "key")
    sockets = Sockets(Security.load(tmp / "key"))
    made = Bench(sockets, tmp, *args)

    async def ticks() -> None:
        while True:
            await asyncio.sleep(0.1)
            for feed in made.feeds:
                feed.tick(asyncio.get_running_loop().time())

    ticking = asyncio.create_task(ticks())
    try:
        made.info = await made.runner.start(lambda fraction, what: None)
        made.service.serve(made.runner, made.info, ["m"], "card")
        yield made
    finally:
        ticking.cancel()
        await made.close()
        sockets.close()


async def until(condition: Callable[[], Any], what: str, within: float = 8.0) -> None:
    deadline = asyncio.get_running_loop().time() + within
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.01)


def prompts(seed: int, count: int, tokens: int = 200) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(tokens) for _ in range(count)]


def test_a_frontend_knows_the_cache_block_for_block(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, "--kv-blocks", "256") as made:
            early = made.follow()
            for prompt in prompts(1, 60):  # more than the cache holds: blocks leave as well
                made.run(prompt)
            await until(lambda: not made.runner.has_work, "all done")
            late = made.follow()
            await until(lambda: made.right(early) and made.right(late), "both frontends right", 2 + 2 * DIGEST_S)
            assert 0 < len(made.truth) <= 256
            (stream,) = early.of(WORKER)
            assert stream.blocks == len(made.truth)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_fast_steps_share_a_batch_and_the_first_after_a_pause_does_not_wait(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path) as made:
            feed = made.follow()
            await until(lambda: made.exact(feed), "exact")
            sent: list[float] = []

            def note(topic: bytes) -> bool:
                if topic == TOPIC_KV:
                    sent.append(asyncio.get_running_loop().time())
                return False

            made.drop = note
            for block in range(1, 101):
                made.service.on_step(Step(kv=[BlocksStored((block,), None, (block,) * 16)]))
                if block == 1:
                    assert len(sent) == 1
                if block % 10 == 0:
                    await asyncio.sleep(0.001)
            await until(lambda: len(made.believed(feed)) == 100, "all told")
            assert len(sent) <= 2 + (sent[-1] - sent[0]) / BATCH_S  # a digest on its way sends what waits early, once
            await asyncio.sleep(BATCH_S)
            before = len(sent)
            made.service.on_step(Step(kv=[BlocksRemoved((1,))]))
            assert len(sent) == before + 1

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_whoever_asks_or_is_told_of_the_whole_hears_of_what_waited(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path) as made:
            source = made.service.kv
            assert source is not None
            ways: list[Callable[[], object]] = [
                lambda: source.answer(b"c", Fetch(1, SNAPSHOT, "0", 0), 0.0),
                lambda: source.answer(b"c", Fetch(1, REPLAY, f"0:{EPOCH}:1", 0), 0.0),
                source.idle,
                source.report,
                lambda: source.dump(0),
            ]
            for count, way in enumerate(ways):
                for block in (2 * count + 1, 2 * count + 2):  # the second waits, whether the first does or not
                    source.take(0, [BlocksStored((block,), None, (block,) * 16)])
                assert source.journals[0].blocks < 2 * count + 2
                way()
                assert source.journals[0].blocks == 2 * count + 2

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_lost_batches_and_digests_are_repaired(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, "--kv-blocks", "512") as made:
            feed, rng = made.follow(), random.Random(3)
            await until(lambda: made.exact(feed), "exact")
            made.drop = lambda topic: topic in (TOPIC_KV, TOPIC_DIGEST) and rng.random() < 0.5
            for prompt in prompts(2, 80):
                made.run(prompt)
                await asyncio.sleep(0.005)
            await until(lambda: not made.runner.has_work, "all done")
            made.drop = lambda topic: False
            await until(lambda: made.right(feed), "right again", 5)
            (stream,) = feed.of(WORKER)
            assert stream.counters.gaps
            assert stream.counters.replays
            assert stream.counters.snapshots == 1

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_the_last_batch_lost_shows_by_the_next_digest(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path) as made:
            feed = made.follow()
            await until(lambda: made.exact(feed), "exact")
            made.drop = lambda topic: topic == TOPIC_KV
            made.run(b"x" * 100)
            await until(lambda: not made.runner.has_work and made.truth, "done")
            made.drop = lambda topic: False
            await until(lambda: made.right(feed), "right again", 2 * DIGEST_S + 0.5)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_silence_is_not_exact(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path) as made:
            feed = made.follow()
            await until(lambda: made.exact(feed), "exact")
            made.drop = lambda topic: topic == TOPIC_DIGEST
            await until(lambda: not made.exact(feed), "no longer exact", STALE_S + 0.5)
            made.drop = lambda topic: False
            await until(lambda: made.right(feed), "exact again", DIGEST_S + 0.5)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_snapshot_of_many_chunks_comes_while_the_cache_changes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, "--kv-blocks", "1024") as made:
            big = tuple(range(1, 60_001))
            tokens = tuple(n % 251 for n in range(16 * len(big)))
            made.service.on_step(Step(kv=[BlocksStored(big, None, tokens)]))
            assert made.service.kv is not None
            assert len(made.service.kv.journals[0].snapshot()) > CHUNK
            feed = made.follow()
            for prompt in prompts(5, 100):
                made.run(prompt)
                await asyncio.sleep(0.002)
            await until(lambda: not made.runner.has_work and made.right(feed), "right", 5)
            assert len(made.truth) > len(big)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_blocks_of_a_lost_worker_are_found_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path) as made:
            feed = made.follow()
            made.run(b"y" * 100)
            await until(lambda: made.right(feed) and made.truth, "right")
            hashes = [one for one, _ in made.truth]
            assert all(feed.index.match([one], -1).blocks for one in hashes)
            made.service.close()
            await until(lambda: not list(feed.of(WORKER)), "the link is down", 2)
            assert not any(feed.index.match([one], -1).blocks for one in hashes)
            while not feed.index.sweep():
                pass
            assert len(feed.index) == 0

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_engine_with_publishers_of_its_own_is_followed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path) as made:
            publisher = EnginePublisher()
            try:
                told = replace(made.info, block_size=4, publishers=((publisher.endpoint, publisher.replay, "kv"),))
                made.service.serve(made.runner, told, ["m"], "card")
                feed = made.follow()
                for block in range(1, 40):
                    publisher.store(block, parent=block - 1 if block > 1 else None, lost=block % 7 == 0)
                publisher.remove(39)
                publisher.store(50)
                await until(lambda: made.right(feed) and len(made.truth) == 39, "what the engine holds is known")
            finally:
                publisher.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
