"""The arguments after ``--``. Imports nothing heavy: the thread count must be known before numpy is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2pdyn.engines.base import EngineUsageError


@dataclass(frozen=True, slots=True)
class BuiltinOptions:
    """``context`` 0 means the model's own; ``max_batch_tokens`` bounds the rows of one step, and so how long a prompt
    delays the tokens of others; ``threads`` counts cores a worker computes on."""

    kv_blocks: int = 1024
    block_size: int = 16
    max_num_seqs: int = 32
    context: int = 0
    max_batch_tokens: int = 128
    threads: int = 1


BOUNDS = {
    "kv_blocks": (2, 1 << 24),
    "block_size": (1, 1024),
    "max_num_seqs": (1, 1024),
    "context": (0, 1 << 24),
    "max_batch_tokens": (1, 1 << 16),
    "threads": (1, 256),
}


def default_threads() -> int:
    """Half the cores that this process may use, so that two workers share a host."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def parse(args: Sequence[str]) -> BuiltinOptions:
    """Read ``--kv-blocks N`` or ``--kv-blocks=N`` and so on. Raises EngineUsageError for what it does not know."""
    options = BuiltinOptions(threads=default_threads())
    rest = list(args)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in BOUNDS:
            known = ", ".join("--" + known.replace("_", "-") for known in BOUNDS)
            raise EngineUsageError(f"the builtin engine does not know {flag!r}: after -- it takes {known}")
        if not equals:
            text = rest.pop(0) if rest else ""
        low, high = BOUNDS[name]
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise EngineUsageError(
                f"{flag} of the builtin engine needs a whole number from {low} to {high}, not {text!r}"
            )
        options = replace(options, **{name: int(text)})
    return options
