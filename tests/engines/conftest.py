"""Small engines, made afresh: every engine that the conformance tests know."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from p2pdyn.engines import builtin
from p2pdyn.engines.base import Engine, EngineOptions
from p2pdyn.engines.sim import SimEngine, create

MakeEngine = Callable[..., Engine]


def make_sim(*, block_size: int = 4, kv_blocks: int = 512, max_num_seqs: int = 32, context: int = 512) -> SimEngine:
    """A simulated engine that never waits."""
    sizes = {"block-size": block_size, "kv-blocks": kv_blocks, "max-num-seqs": max_num_seqs, "context": context}
    args = [f"--{name}={value}" for name, value in sizes.items()]
    return create(EngineOptions(args=("--speedup=0", *args)))


def make_builtin(
    *, block_size: int = 4, kv_blocks: int = 512, max_num_seqs: int = 32, context: int = 512
) -> builtin.BuiltinEngine:
    """The builtin engine with its tiny model."""
    sizes = {"block-size": block_size, "kv-blocks": kv_blocks, "max-num-seqs": max_num_seqs, "context": context}
    return builtin.create(EngineOptions("tiny", args=tuple(f"--{name}={value}" for name, value in sizes.items())))


ENGINES: dict[str, MakeEngine] = {"sim": make_sim, "builtin": make_builtin}


@pytest.fixture(params=sorted(ENGINES))
def make_engine(request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    """Makes and loads engines of one kind; closes them, and checks that they are empty then."""
    made: list[Engine] = []

    def make(**sizes: int) -> Engine:
        engine = ENGINES[request.param](**sizes)
        engine.load(lambda fraction, what: None)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()
        load = engine.load_report()
        assert (load.active_requests, load.active_blocks, load.queued, load.prefill_tokens_queued) == (0, 0, 0, 0)
        assert engine.next_step(0.0) is None
