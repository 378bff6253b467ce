"""Moving KV blocks between two engines by hand, as the peers' transfer does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from p2pdyn.engines.base import Engine, Held, Pin, Release, Reserved, Settle, TransferNote
from p2pdyn.engines.lending import TAG
from support.engines import Mirror, Result, collect, sequence


def memory(engine: Any) -> memoryview:
    """The engine's KV blocks and tags."""
    assert isinstance(engine.memory, memoryview)
    return engine.memory


def block_bytes(engine: Any) -> int:
    return len(memory(engine)) // engine.cache.blocks - TAG.size


def tag(engine: Any, block: int) -> tuple[bytes, int, int]:
    """(half of the key, epoch, generation) behind the blocks."""
    half, epoch, generation = TAG.unpack_from(
        memory(engine), engine.cache.blocks * block_bytes(engine) + block * TAG.size
    )
    return half, epoch, generation


def copy(source: memoryview, held: Sequence[int], target: memoryview, reserved: Sequence[int], size: int) -> None:
    """The bytes of ``held`` into ``reserved``."""
    for there, here in zip(held, reserved, strict=False):
        target[here * size : (here + 1) * size] = source[there * size : (there + 1) * size]


def run(engine: Engine, results: dict[int, Result], mirror: Mirror | None = None) -> list[TransferNote]:
    """Step until the engine is idle; what it has told."""
    notes: list[TransferNote] = []
    now = 0.0
    while (due := engine.next_step(now)) is not None:
        now = max(now, due)
        step = engine.step(now)
        collect(results, step)
        notes += step.transfers
        if mirror is not None:
            mirror.apply(step.kv)
    return notes


def hand_over(engine: Engine, key: int, prompt: Iterable[int], output: Iterable[int] = (), **params: Any) -> Held:
    """Prefill there; fails if the engine says anything else."""
    results: dict[int, Result] = {}
    engine.submit(replace(sequence(key, prompt, output, **params), hand_over=True), 0.0)
    notes = run(engine, results)
    assert not results
    (held,) = notes
    assert isinstance(held, Held)
    assert held.key == key
    return held


def pin(engine: Engine, key: int, keys: tuple[bytes, ...]) -> Held:
    engine.transfer(Pin(key, keys), 0.0)
    assert engine.next_step(5.0) == 5.0
    (held,) = engine.step(5.0).transfers
    assert isinstance(held, Held)
    return held


def reserve(
    engine: Engine, key: int, pull: int, prompt: Iterable[int], output: Iterable[int] = (), **params: Any
) -> Reserved:
    """Submit with ``pull`` into an engine that is otherwise idle."""
    engine.submit(replace(sequence(key, prompt, output, **params), pull=pull), 0.0)
    (reserved,) = engine.step(0.0).transfers
    assert isinstance(reserved, Reserved)
    return reserved


def pull(source: Engine, held: Held, target: Engine, reserved: Reserved, filled: int | None = None) -> None:
    """Carry out a whole transfer: bytes, settle, release. ``filled`` blocks of it, or all."""
    count = len(reserved.blocks) if filled is None else filled
    assert held.keys[reserved.first : reserved.first + count] == reserved.keys[:count]
    copy(
        memory(source),
        held.blocks[reserved.first :][:count],
        memory(target),
        reserved.blocks[:count],
        block_bytes(target),
    )
    target.transfer(Settle(reserved.key, count), 0.0)
    source.transfer(Release(held.key), 0.0)
