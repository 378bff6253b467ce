"""The engines by name, found without importing any of them.

An engine's module has one entry, ``create(options: EngineOptions) -> Engine``, which parses the arguments and raises
EngineError with a sentence for a wrong one; loading is :meth:`p2pdyn.engines.base.Engine.load`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from p2pdyn.engines.base import Engine, EngineError, EngineOptions


@dataclass(frozen=True, slots=True)
class EngineKind:
    """``module`` is imported only where the engine runs: in the peer itself, or with ``child`` in a process of its own.
    ``help`` lists the arguments after ``--`` with their defaults."""

    module: str
    child: bool
    help: str


ENGINES: dict[str, EngineKind] = {
    "sim": EngineKind(
        "p2pdyn.engines.sim",
        child=False,
        help="--prefill-tps 20000 --itl-ms 10 --kv-blocks 8192 --block-size 16 --max-num-seqs 256 --context 32768 "
        "--speedup 1 --seed 0 --max-batch-tokens 8192 --kv-bytes-per-block 16",
    ),
    "builtin": EngineKind(
        "p2pdyn.engines.builtin",
        child=True,
        help="--kv-blocks 1024 --block-size 16 --max-num-seqs 32 --context 0 (the model's own) --max-batch-tokens 128 "
        "--threads (half the cores)",
    ),
    "vllm": EngineKind(
        "p2pdyn.engines.vllm",
        child=True,
        help="vLLM's own flags (vllm serve --help=all), as --max-model-len 8192 --tensor-parallel-size 2, and "
        "--lora-modules NAME=FOLDER...; KV events, prefix caching and, by role, NIXL are on by themselves",
    ),
}


def find(name: str) -> EngineKind:
    """The engine called ``name``; EngineError names the known ones."""
    kind = ENGINES.get(name)
    if kind is None:
        raise EngineError(f"engine {name!r} is not known: use one of {', '.join(ENGINES)}")
    return kind


def create(module: str, options: EngineOptions) -> Engine:
    """Import an engine's module and make the engine; nothing is loaded yet."""
    engine: Engine = import_module(module).create(options)
    return engine
