"""What an engine is to the runtime.

An engine runs sequences of token ids and answers token ids, step by step.  It owns no thread of the peer and no socket:
whoever drives it (the engine host child, or the peer itself for `sim`) calls :meth:`Engine.step` when
:meth:`Engine.next_step` says so.  Each step's outcome is one :class:`Step`, which becomes one frame on the way to the
frontends.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from p2pdyn.core.types import Load, SamplingParams

Progress = Callable[[float, str], None]
"""``progress(fraction in 0..1, what is being done)``, called while loading."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is made from. ``model`` is a folder, a file or a name, as ``--model`` says; ``args`` are the
    command line's arguments after ``--``; ``data_dir`` is the peer's own folder. ``node``, ``epoch`` and ``role`` are
    the peer's; ``host`` is the address that other peers reach this host by, and ``side_port`` the port there (0: a
    free one) for an engine that exchanges its transfers' metadata on a socket of its own."""

    model: str | None = None
    served_name: str | None = None
    args: tuple[str, ...] = ()
    offline: bool = False
    data_dir: Path = Path()
    node: str = ""
    epoch: int = 0
    role: str = "aggregated"
    host: str = "127.0.0.1"
    side_port: int = 0
    kv_memory: int = -1
    """File to keep the KV memory in, where the peer maps it too (:mod:`p2pdyn.engines.memory`); -1: none."""


@dataclass(slots=True)
class Sequence:
    """One sequence to run. ``key`` is the driver's; tokens[:prompt_len] is the prompt, the rest is output that an
    earlier attempt already produced: generation goes on behind it as if it had been produced here. ``traceparent`` (W3C
    Trace Context, or empty) is for the engine's own spans; ``rank`` is the data-parallel rank to run on."""

    key: int
    tokens: array[int]
    prompt_len: int
    params: SamplingParams
    traceparent: str = ""
    rank: int = 0
    hand_over: bool = False
    """Prefill only: compute all of ``tokens``, keep their KV blocks, tell them as :class:`Held`, produce no token."""
    pull: int = 0
    """So many leading full blocks are expected from another worker: the engine reserves those that its own cache lacks,
    tells them as :class:`Reserved`, and goes on with the sequence at :class:`Settle`. 0: nothing is expected, as always
    with ``hand_over``."""
    remote: bytes = b""
    """For an engine that moves KV by itself (``EngineInfo.moves_kv``): what the other's :attr:`Held.params` said."""


@dataclass(slots=True)
class Output:
    """What one step produced for one sequence. ``finish``: "" (goes on), stop, length, abort, error (``detail`` says
    why, and it is tried elsewhere) or invalid (no worker could serve this request, said before its first token: the
    client is told ``detail``); with stop the last token is the end or stop token itself. ``cached`` counts prompt
    tokens served from the prefix cache, told with the first output. ``logprobs``, where asked for: one
    ``(chosen logprob, ((token id, logprob), ...))`` a token."""

    key: int
    tokens: tuple[int, ...]
    finish: str = ""
    cached: int = 0
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()
    detail: str = ""


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Full KV blocks now in cache: consecutive, ``hashes[i]`` is the engine's own id of the i-th, ``tokens`` are the
    block_size * len(hashes) ids in them, ``parent`` is the id of the block before, None at the start of a sequence.
    ``tier``: 0 device, 1 host, 2 disk."""

    hashes: tuple[int, ...]
    parent: int | None
    tokens: tuple[int, ...]
    salt: str = ""
    lora: str = ""
    tier: int = 0


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """No longer in ``tier``; another tier may still hold them."""

    hashes: tuple[int, ...]
    tier: int = 0


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """Nothing is in cache any more, in any tier."""


KvEvent = BlocksStored | BlocksRemoved | BlocksCleared


# Between the engine and the peer's transfer (docs/design/kv-transfer.md). Blocks are the engine's own numbers, keys
# the 16 bytes that name a block and all before it (:class:`p2pdyn.engines.paged.BlockNames`).


@dataclass(frozen=True, slots=True)
class Held:
    """These full blocks stay as they are until :class:`Release` of ``key``: those of a sequence with ``hand_over`` once
    its prompt is computed; of a :class:`Pin`, as long a prefix as is cached, maybe none. ``generations`` say which use
    of a block this is. An engine that moves KV by itself tells only ``params``: opaque bytes for the other's
    :attr:`Sequence.remote`. ``cached`` counts prompt tokens from the prefix cache."""

    key: int
    blocks: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    keys: tuple[bytes, ...] = ()
    cached: int = 0
    params: bytes = b""
    computed: bool = True
    """False: ``params`` are told before the prompt is computed, which the other side waits for (SGLang). The sequence
    goes on, until another Held, without ``params``, tells that it is over, whether or not it came to something."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A sequence with ``pull`` has its blocks; these are empty and belong to whoever fills them until :class:`Settle`,
    also if the sequence is aborted meanwhile. ``first`` is the index in the sequence of the first of them; none at all
    if everything was cached here, and then no Settle follows."""

    key: int
    first: int
    blocks: tuple[int, ...]
    keys: tuple[bytes, ...]


TransferNote = Held | Reserved


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep the longest cached prefix of the blocks named by ``keys``, and tell it as :class:`Held`."""

    key: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody reads the blocks of this :class:`Held`, or writes those of a Settle that was not ``over``, any more."""

    key: int


@dataclass(frozen=True, slots=True)
class Settle:
    """The first ``filled`` blocks of a :class:`Reserved` are there and proven; the sequence goes on and computes the
    rest. ``over`` False: something may still write into the blocks, so they stay out of use until :class:`Release`, and
    the sequence needs others (``filled`` is 0 then)."""

    key: int
    filled: int
    over: bool = True


TransferOrder = Pin | Release | Settle


@dataclass(slots=True)
class Step:
    """Everything one engine step produced."""

    outputs: list[Output] = field(default_factory=list)
    kv: list[KvEvent] = field(default_factory=list)
    transfers: list[TransferNote] = field(default_factory=list)

    def ended(self) -> list[int]:
        """Keys of the sequences of which no more comes; a Held is the end of a sequence, too."""
        ends = [output.key for output in self.outputs if output.finish]
        if self.transfers:
            ends += [note.key for note in self.transfers if isinstance(note, Held) and note.computed]
        return ends


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is once loaded. ``features`` names what it honours beyond plain sampling (logprobs,
    prompt_logprobs, penalties, guided, min_p, seed, ...); the frontend answers 400 for the rest. ``card`` is the packed
    model card (:mod:`p2pdyn.text.card`). ``weights`` is any text that two workers of one model share exactly when they
    compute the same; it enters the fingerprint by which workers are routed together. ``ranks`` counts data-parallel
    ranks; ``kv_events``: it tells every change of its prefix cache, in its steps or, where ``publishers`` are named, on
    ZeroMQ sockets of its own on this host: (events, replay, topic) of each rank, as vLLM and SGLang have them."""

    engine: str
    version: str
    model: str
    card: bytes
    block_size: int
    kv_blocks: int
    max_num_seqs: int
    context: int
    features: tuple[str, ...] = ()
    weights: str = ""
    ranks: int = 1
    kv_events: bool = True
    publishers: tuple[tuple[str, str, str], ...] = ()
    block_bytes: int = 0
    """Of one KV block in the memory that :class:`p2pdyn.engines.runner.Runner` shows; 0: the engine shows none."""
    moves_kv: str = ""
    """The engine moves KV blocks between workers by itself, with this library (vLLM's connector: nixl); as
    :class:`p2pdyn.core.types.ServedModel` has it."""


class Engine(Protocol):
    """Constructed with its parsed arguments; not thread-safe; nothing here blocks except load and step."""

    def load(self, progress: Progress) -> EngineInfo:
        """Load the model. Raises EngineError with a sentence and its mend."""

    def submit(self, sequence: Sequence, now: float) -> None:
        """Queue a sequence. One that can never run ends with an :class:`Output`: finish "invalid" if no worker of the
        model could run it (longer than the context), else "error"."""

    def abort(self, key: int, now: float) -> None:
        """Stop a sequence at once; it produces nothing more. Unknown keys are ignored. What is told as Held stays held,
        what is told as Reserved stays reserved."""

    def transfer(self, order: TransferOrder, now: float) -> None:
        """Carry out an order of the peer's transfer. Unknown keys are ignored."""

    def next_step(self, now: float) -> float | None:
        """When :meth:`step` is due (``<= now``: at once), or None while idle."""

    def step(self, now: float) -> Step:
        """Run, or complete, one batch step: at most one token a sequence."""

    def load_report(self) -> Load:
        """The load now; cheap, called several times a second."""

    def close(self) -> None:
        """Free everything. Idempotent."""


class EngineError(RuntimeError):
    """An engine that cannot load or go on; the message is one sentence with the mend."""


class EngineUsageError(EngineError):
    """Engine arguments that cannot work whenever they are tried; as EngineError otherwise."""


def death_reason(name: str, error: Exception) -> str:
    """One line for the log and for the frontends; the traceback of what is no EngineError goes to stderr."""
    return str(error) if isinstance(error, EngineError) else f"engine {name} failed: {type(error).__name__}: {error}"
