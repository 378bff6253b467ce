"""An engine's own publisher over real sockets: losses, restarts, replays of both kinds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq
from support.engine_publisher import EnginePublisher

from p2pdyn.core.types import Address
from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, KvEvent
from p2pdyn.net import engine_events
from p2pdyn.net.curve import Keypair, Security
from p2pdyn.net.engine_events import EngineEvents, EventsStatus, Publisher, local_endpoint
from p2pdyn.net.sockets import IpcAddress, Sockets


class Follower:
    """What is known of a publisher's cache from what EngineEvents tells."""

    def __init__(self, sockets: Sockets, *publishers: Publisher) -> None:
        self.caches: dict[int, set[int]] = {publisher.rank: set() for publisher in publishers}
        self.calls = 0
        self.events = EngineEvents(sockets, publishers, 4, self._take)

    def _take(self, rank: int, events: list[KvEvent]) -> None:
        self.calls += 1
        cache = self.caches[rank]
        for event in events:
            if isinstance(event, BlocksCleared):
                cache.clear()
            elif isinstance(event, BlocksRemoved):
                cache.difference_update(event.hashes)
            else:
                cache.update(event.hashes)

    def status(self, rank: int = 0) -> EventsStatus:
        return self.events.status()[rank]

    async def state(self, state: str, rank: int = 0) -> None:
        await until(lambda: self.status(rank).state == state)

    async def knows(self, publisher: EnginePublisher, rank: int = 0) -> None:
        await until(lambda: self.caches[rank] == publisher.cache and self.status(rank).state == "exact")


def run(body: Callable[[Sockets], Awaitable[None]], security: Security | None = None) -> None:
    async def main() -> None:
        sockets = Sockets(security or Security.insecure())
        try:
            async with asyncio.timeout(30):
                await body(sockets)
        finally:
            sockets.close()

    uvloop.run(main())


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(15):
        while not condition():  # noqa: ASYNC110  # what it waits for happens in other threads
            await asyncio.sleep(0.005)


def of(engine: EnginePublisher, rank: int = 0) -> Publisher:
    return Publisher(engine.endpoint, engine.replay, "kv", rank)


@pytest.fixture
def engine() -> Any:
    publisher = EnginePublisher()
    yield publisher
    publisher.close()


@pytest.mark.parametrize("topics", [True, False])
def test_events_before_and_after_the_connection_arrive_once_and_in_order(topics: bool) -> None:
    engine = EnginePublisher(topics=topics)
    for block in range(500):
        engine.store(block)

    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, of(engine))
        await follower.knows(engine)
        assert len(follower.caches[0]) == 500
        for block in range(0, 500, 2):
            engine.remove(block)
        await follower.knows(engine)
        engine.clear()
        await follower.knows(engine)
        assert follower.status() == EventsStatus(0, "exact", "", 750, 0, 0, {})
        assert follower.calls < 400

    try:
        run(body)
    finally:
        engine.close()


def test_a_cluster_key_is_not_used_towards_the_engine(engine: EnginePublisher) -> None:
    async def body(sockets: Sockets) -> None:
        engine.store(1)
        await Follower(sockets, of(engine)).knows(engine)

    run(body, Security((Keypair(*zmq.curve_keypair()),)))


def test_a_loss_is_replayed_while_live_events_go_on(engine: EnginePublisher) -> None:
    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, of(engine))
        engine.store(0)
        await follower.knows(engine)
        for block in range(1, 200):
            engine.store(block, lost=block % 7 == 0)
            if block % 3 == 0:
                engine.remove(block - 1, lost=block % 6 == 0)
        await follower.knows(engine)
        assert (follower.status().restarts, follower.status().lost) == (0, 0)

    run(body)


def test_the_last_event_lost_is_found_by_the_probe(engine: EnginePublisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_events, "PROBE_S", 0.05)

    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, of(engine))
        engine.store(1)
        await follower.knows(engine)
        engine.remove(1, lost=True)
        await follower.knows(engine)

    run(body)


@pytest.mark.parametrize("published", [0, 1, 3, 30])
def test_a_restarted_engine_is_followed_from_its_start(published: int) -> None:
    engine = EnginePublisher()
    reborn: list[EnginePublisher] = []

    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, of(engine))
        for block in (1, 2, 3):
            engine.store(block)
        await follower.knows(engine)
        engine.close()
        await follower.state("down")
        assert "lost" in follower.status().problem
        reborn.append(EnginePublisher(engine.endpoint, engine.replay))
        for block in range(50, 50 + published):
            reborn[0].store(block)
        await follower.knows(reborn[0])
        reborn[0].store(99)
        await follower.knows(reborn[0])
        assert follower.status().restarts == 1

    try:
        run(body)
    finally:
        engine.close()
        for one in reborn:
            one.close()


def test_a_connection_lost_alone_costs_nothing(engine: EnginePublisher) -> None:
    """As from a publisher that is seen again with the same last message."""

    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, of(engine))
        engine.store(1)
        await follower.knows(engine)
        calls = follower.calls
        stream = follower.events._streams[0]
        stream._disconnected("gone")
        assert follower.status().state == "down"
        stream._connected()
        await follower.knows(engine)
        engine.store(2)
        await follower.knows(engine)
        assert (follower.status().restarts, follower.calls) == (0, calls + 1)

    run(body)


def test_a_buffer_too_short_is_told_until_the_cache_is_reset() -> None:
    engine = EnginePublisher(keep=3)

    async def body(sockets: Sockets) -> None:
        for block in range(10):
            engine.store(block)
        follower = Follower(sockets, of(engine))
        await follower.state("degraded")
        assert "no longer has the events that were missed" in follower.status().problem
        engine.store(10)
        await until(lambda: follower.caches[0] == {7, 8, 9, 10})
        engine.clear()
        await follower.knows(engine)
        assert follower.status().problem == ""

    try:
        run(body)
    finally:
        engine.close()


@pytest.mark.parametrize("configured", [True, False])
def test_without_replays_a_gap_forgets_and_says_so(
    engine: EnginePublisher, monkeypatch: pytest.MonkeyPatch, configured: bool
) -> None:
    monkeypatch.setattr(engine_events, "REPLAY_S", 0.02)
    engine.mute = True

    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, Publisher(engine.endpoint, engine.replay if configured else "", "kv"))
        await follower.state("degraded")
        engine.store(1)
        await follower.knows(engine)
        engine.remove(1, lost=True)
        engine.store(2)
        await follower.state("degraded")
        assert follower.caches[0] == {2}
        assert "does not replay" in follower.status().problem
        assert len(engine.requests) >= 2 * engine_events.REPLAY_TRIES if configured else not engine.requests

    run(body)


def test_a_replay_that_stalls_is_asked_for_anew(engine: EnginePublisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_events, "REPLAY_S", 0.1)
    monkeypatch.setattr(engine_events, "REPLAY_TRIES", 1000)
    engine.mute = True
    engine.store(1)

    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, of(engine))
        await until(lambda: engine.requests)
        engine.mute = False
        await follower.knows(engine)
        assert len(engine.requests) >= 2

    run(body)


def test_each_rank_has_a_stream_of_its_own_and_sockets_may_be_files(tmp_path: Path, engine: EnginePublisher) -> None:
    other = EnginePublisher(f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay")

    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, of(engine), of(other, 1))
        engine.store(1)
        other.store(2)
        await follower.knows(engine, 0)
        await follower.knows(other, 1)
        assert follower.caches == {0: {1}, 1: {2}}

    try:
        run(body)
    finally:
        other.close()


def test_garbage_clears_and_the_stream_goes_on(engine: EnginePublisher, caplog: pytest.LogCaptureFixture) -> None:
    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, of(engine))
        engine.store(1)
        await follower.knows(engine)
        engine.publish_bytes(b"\xc1")
        engine.publish_bytes(b"\xc1")
        engine.store(2)
        await until(lambda: follower.caches[0] == {2})
        assert follower.status().state == "degraded"
        assert follower.status().dropped == {"unreadable": 2}

    run(body)
    assert sum("could not be read" in record.message for record in caplog.records) == 1


def test_another_block_size_is_one_sentence(engine: EnginePublisher) -> None:
    async def body(sockets: Sockets) -> None:
        events = EngineEvents(sockets, [of(engine)], 16, lambda rank, events: None)
        engine.store(1)
        await until(lambda: "blocks of 4 tokens, its configuration says 16" in events.status()[0].problem)

    run(body)


def test_nothing_is_told_after_close(engine: EnginePublisher) -> None:
    async def body(sockets: Sockets) -> None:
        follower = Follower(sockets, of(engine))
        engine.store(1)
        await follower.knows(engine)
        calls = follower.calls
        follower.events.close()
        follower.events.close()
        engine.store(2)
        await asyncio.sleep(0.05)
        assert follower.calls == calls
        assert not sockets._links

    run(body)


@pytest.mark.parametrize(
    "text",
    ["tcp://*:5557", "tcp://0.0.0.0:5557", "tcp://192.0.2.1:5557", "tcp://engine:5557", "inproc://x", "ipc://", "x"],
)
def test_other_hosts_endpoints_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an endpoint of this host"):
        local_endpoint(text)


def test_endpoints_of_this_host_and_of_other_ranks() -> None:
    assert local_endpoint("tcp://127.0.0.1:5557") == Address("127.0.0.1", 5557)
    assert local_endpoint("tcp://[::1]:5557") == Address("::1", 5557)
    assert local_endpoint("tcp://localhost:5557") == Address("localhost", 5557)
    assert local_endpoint("ipc:///run/kv") == IpcAddress("/run/kv")
    base = Publisher("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5567")
    assert base.at_rank(2) == Publisher("tcp://127.0.0.1:5559", "tcp://127.0.0.1:5569", rank=2)
    with pytest.raises(ValueError, match="one data-parallel rank only"):
        Publisher("ipc:///run/kv").at_rank(1)
