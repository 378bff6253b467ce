"""The simulated engine's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from p2pdyn.engines.base import EngineUsageError

_RANGES: dict[str, tuple[float, float]] = {
    "prefill_tps": (1e-3, 1e9),
    "itl_ms": (0.0, 1e6),
    "kv_blocks": (1, 2**24),
    "block_size": (1, 4096),
    "max_num_seqs": (1, 65536),
    "context": (2, 2**22),
    "speedup": (0.0, 1e6),
    "seed": (-(2**63), 2**63 - 1),
    "max_batch_tokens": (1, 2**22),
    "kv_bytes_per_block": (16, 2**24),
}


@dataclass(frozen=True, slots=True)
class SimArgs:
    """``prefill_tps`` in tokens/s, ``itl_ms`` the time of a decode step; both are divided by ``speedup`` (0: no
    waiting).  ``context`` is in tokens, as is ``max_batch_tokens``, the most that one step computes.  ``seed`` and
    ``kv_bytes_per_block`` stand for the model's weights: the workers of one model must share them."""

    prefill_tps: float = 20000.0
    itl_ms: float = 10.0
    kv_blocks: int = 8192
    block_size: int = 16
    max_num_seqs: int = 256
    context: int = 32768
    speedup: float = 1.0
    seed: int = 0
    max_batch_tokens: int = 8192
    kv_bytes_per_block: int = 16

    @classmethod
    def parse(cls, args: Sequence[str]) -> SimArgs:
        """From ``--name value`` or ``--name=value``. Raises EngineUsageError with the mend."""
        values: dict[str, float] = {}
        defaults = cls()
        rest = list(args)
        while rest:
            flag, equals, value = rest.pop(0).partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            if not flag.startswith("--") or name not in _RANGES:
                known = ", ".join("--" + item.name.replace("_", "-") for item in fields(cls))
                raise EngineUsageError(f"unknown argument {flag!r} for the sim engine: it takes {known}")
            if not equals:
                if not rest:
                    raise EngineUsageError(f"argument {flag} needs a value: {flag} {getattr(defaults, name)}")
                value = rest.pop(0)
            values[name] = _number(flag, value, type(getattr(defaults, name)), *_RANGES[name])
        parsed = cls(**values)  # type: ignore[arg-type]
        if parsed.kv_bytes_per_block % 16:
            raise EngineUsageError("argument --kv-bytes-per-block must be a multiple of 16")
        return parsed


def _number(flag: str, text: str, kind: type, low: float, high: float) -> float:
    try:
        value: float = kind(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        raise EngineUsageError(f"argument {flag} is {text!r}, but must be {what} from {low:g} to {high:g}")
    return value
