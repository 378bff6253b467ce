"""The engines that the suite knows, and how to name another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from support import vllm_engine

CAPABILITIES = frozenset(
    {"cache_salt", "eos", "hand over", "kv events", "logprobs", "min_tokens", "resumed seed", "seed"}
)
"""What an engine may be unable to do. The names without a blank are those of EngineInfo.features."""

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Subject:
    """How the suite starts an engine. Ask for few sequences at once (2 to 8), a context of 512 to 2048 tokens and room
    in the cache for two to eight such contexts: the tests fill it.

    ``engine`` as ``--engine`` takes it; ``model`` makes or finds the model, given an empty folder; ``args`` go behind
    ``--``; ``environment`` is set while its engines run. ``cannot`` maps some of :data:`CAPABILITIES` to the reason
    that is printed where a test is skipped. ``tie``: where the two best logprobs are nearer than this, either is right,
    for engines whose arithmetic depends on the batch; 0 demands the same tokens, always."""

    name: str
    engine: str
    args: tuple[str, ...] = ()
    model: Callable[[Path], str | None] = lambda folder: None
    environment: Mapping[str, str] = field(default_factory=dict)
    cannot: Mapping[str, str] = field(default_factory=dict)
    tie: float = 0.0
    apart: bool = False
    """It computes on threads or processes of its own, so that a step may find several tokens of a sequence."""
    distribution: str = ""
    """Module without which the engine cannot run here."""
    start_s: float = 30.0
    patience_s: float = 20.0
    """Longest that a test waits for anything but the start."""

    def __post_init__(self) -> None:
        unknown = set(self.cannot) - CAPABILITIES
        if unknown:
            raise ValueError(f"{self.name} cannot {', '.join(unknown)}: use some of {', '.join(sorted(CAPABILITIES))}")

    @property
    def missing(self) -> str:
        """Why it cannot run here, or nothing."""
        lacks = self.distribution and find_spec(self.distribution) is None
        return f"{self.distribution} is not installed in this environment" if lacks else ""


def _tiny_llama(folder: Path) -> str:
    from support import tiny_llama

    return str(tiny_llama.make(folder / "tiny"))


_SIZES = ("--kv-blocks=256", "--block-size=16", "--max-num-seqs=4", "--context=1024")
_PRINTABLE = "its tokens are printable, never an end token"

SIM = Subject("sim", "sim", (*_SIZES, "--itl-ms=1", "--prefill-tps=200000"), cannot={"eos": _PRINTABLE})
BUILTIN = Subject("builtin", "builtin", _SIZES, lambda folder: "tiny", cannot={"eos": _PRINTABLE})
NGRAM = Subject(
    "ngram",
    "ngram_engine:create",
    ("--kv-blocks=256", "--context=1024"),
    environment={"PYTHONPATH": str(ROOT / "examples" / "engine")},
    cannot={"hand over": "the example moves no KV blocks", "logprobs": "the example has none"},
)
VLLM = Subject(
    "vllm",
    "vllm",
    ("--enforce-eager", "--dtype=float32", "--max-num-seqs=4", "--max-model-len=1024", "--num-gpu-blocks-override=128"),
    _tiny_llama,
    {**vllm_engine.ENVIRONMENT, "UCX_TLS": "tcp,self"},
    {"resumed seed": "its generator does not count by position"},
    tie=1e-3,
    apart=True,
    distribution="vllm",
    start_s=280.0,
    patience_s=60.0,
)
_NO_SEEDS = "it goes by seeds only with --enable-deterministic-inference, which no attention backend for CPUs does"
SGLANG = Subject(
    "sglang",
    "sglang",
    ("--cpu-shim", "--dtype=float32", "--max-running-requests=4", "--context-length=1024", "--max-total-tokens=4096"),
    _tiny_llama,
    {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    {"seed": _NO_SEEDS, "resumed seed": _NO_SEEDS},
    tie=1e-3,
    apart=True,
    distribution="sglang",
    start_s=280.0,
    patience_s=60.0,
)

SUBJECTS = {subject.name: subject for subject in (SIM, BUILTIN, NGRAM, VLLM, SGLANG)}
ELSEWHERE = {"trtllm": "support.trtllm_subject:NEWEST"}
"""TensorRT-LLM's is its double."""
DEFAULT = ("sim", "builtin", "ngram", "trtllm")
"""Those that run wherever p2pdyn does."""


def find(name: str) -> Subject:
    """By name, or ``package.module:ATTRIBUTE``. Raises ValueError with a sentence."""
    if name in SUBJECTS:
        return SUBJECTS[name]
    module, colon, attribute = ELSEWHERE.get(name, name).partition(":")
    if not colon:
        known = ", ".join((*SUBJECTS, *ELSEWHERE))
        raise ValueError(f"engine {name!r} is not known: use one of {known}, or MODULE:SUBJECT")
    if "" not in sys.path:
        sys.path.insert(0, "")
    subject = getattr(import_module(module), attribute)
    if not isinstance(subject, Subject):
        raise ValueError(f"{name} is a {type(subject).__name__}: name a Subject of engines.conformance.subjects")
    return subject
