"""What an engine's own publisher tells of its KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from p2pdyn.engines.base import BlocksStored, KvEvent
from p2pdyn.net.curve import Security
from p2pdyn.net.engine_events import EngineEvents, Publisher
from p2pdyn.net.sockets import Sockets
from support.vllm_engine import Vllm


@contextmanager
def told_by(engine: Vllm) -> Iterator[tuple[list[KvEvent], EngineEvents]]:
    """All events in the engine's order, earlier ones included, and how the stream of them is."""
    assert engine.info is not None
    told: list[KvEvent] = []

    def take(rank: int, events: list[KvEvent]) -> None:
        told.extend(events)
        engine.changed.set()

    publishers = [Publisher(*places, rank=rank) for rank, places in enumerate(engine.info.publishers)]
    with (
        closing(Sockets(Security.insecure())) as sockets,
        closing(EngineEvents(sockets, publishers, engine.info.block_size, take)) as events,
    ):
        yield told, events


def stored(told: list[KvEvent], salt: str) -> dict[int, int]:
    """Tokens of the full blocks of sequences that began with ``salt``, by the index in ``told`` that tells of them."""
    chain: set[int | None] = set()
    tokens = {}
    for at, event in enumerate(told):
        if isinstance(event, BlocksStored) and ((event.parent is None and event.salt == salt) or event.parent in chain):
            chain.update(event.hashes)
            tokens[at] = len(event.tokens)
    return tokens
