"""The engines by name, found without importing any of them.

An engine's module has one entry, ``create(options: EngineOptions) -> Engine``, which parses the arguments and raises
EngineError with a sentence for a wrong one; loading is :meth:`p2pdyn.engines.base.Engine.load`.  Engines of others are
named ``package.module:factory``, or by an entry point of the group :data:`GROUP` with such a value (docs/engines.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module

from p2pdyn.engines.base import Engine, EngineError, EngineOptions, EngineUsageError

GROUP = "p2pdyn.engines"
"""Entry points of installed distributions that are engines: ``name = package.module:factory``."""
FACTORY = re.compile(r"(?=.{3,64}$)[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class EngineKind:
    """``module`` is imported only where the engine runs: in the peer itself, or with ``child`` in a process of its own;
    behind a colon may be its entry's name. ``help`` lists the arguments after ``--`` with their defaults."""

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
    "sglang": EngineKind(
        "p2pdyn.engines.sglang",
        child=True,
        help="SGLang's own flags (python -m sglang.launch_server --help), as --context-length 8192 --tp-size 2; pages "
        "of 16 tokens, KV events and, by role, NIXL are on by themselves; --cpu-shim runs small models without a GPU",
    ),
    "trtllm": EngineKind(
        "p2pdyn.engines.trtllm",
        child=True,
        help="arguments of tensorrt_llm.LLM, as --tensor-parallel-size 2 --kv-cache-config.max-tokens 65536, and "
        "--lora-modules NAME=FOLDER...; KV events and, by role, the cache transceiver are on by themselves; written to "
        "the API of TensorRT-LLM 1.2 and 1.3, not run on hardware by us",
    ),
}


def installed() -> dict[str, str]:
    """The engines that other distributions bring: name to ``module:factory``. Reads the metadata of all that is
    installed, so it is asked only for a name that is none of ours."""
    from importlib import metadata

    return {entry.name: entry.value for entry in metadata.entry_points(group=GROUP) if FACTORY.fullmatch(entry.value)}


def find(name: str) -> EngineKind:
    """The engine called ``name``; EngineError names the known ones."""
    if name in ENGINES:
        return ENGINES[name]
    module = name if FACTORY.fullmatch(name) else installed().get(name)
    if module is None:
        raise EngineError(f"engine {name!r} is not known: use one of {', '.join(ENGINES)}, or MODULE:FACTORY")
    return EngineKind(module, child=True, help="its own")


def create(module: str, options: EngineOptions) -> Engine:
    """Import an engine's module and make the engine; nothing is loaded yet."""
    path, _, entry = module.partition(":")
    if not entry:
        engine: Engine = import_module(path).create(options)
        return engine
    try:
        factory = getattr(import_module(path), entry)
    except (ModuleNotFoundError, AttributeError) as error:
        raise EngineUsageError(f"engine {module} is not there ({error}): install it, or set PYTHONPATH") from error
    made: Engine = factory(options)
    return made
