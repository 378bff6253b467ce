"""Plain values shared by cores, wire and shells."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NewType

NodeId = NewType("NodeId", str)
"""16 lower-case hex digits (64 random bits), kept in the node's data dir."""

MAX_HOST = 255
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[\w.-]{1,15})?")
"""Near enough to tell an IPv6 literal (zone included) from a name with a stray colon; the resolver is the judge."""


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A TCP endpoint. ``host`` is an IPv4/IPv6 literal or a DNS name, without brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> Address:
        """Read ``host:port``, ``[v6]:port`` or, with ``default_port``, a bare host.

        Raises ValueError with a sentence that names the text and the form expected.
        """
        host, port = text.strip(), ""
        if host.startswith("["):
            host, bracket, rest = host[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise ValueError(f"address {text!r} is not of the form [IPV6]:PORT")
            port = rest[1:]
        elif host.count(":") == 1:
            host, _, port = host.partition(":")
        elif ":" in host and default_port is None:
            raise ValueError(f"address {text!r} is ambiguous: write an IPv6 address as [ADDRESS]:PORT")
        if not host or len(host) > MAX_HOST or any(c.isspace() or c == "/" for c in host):
            raise ValueError(f"address {text!r} has no valid host: write HOST:PORT")
        if ":" in host and not _IPV6.fullmatch(host):
            raise ValueError(f"address {text!r} has no valid host: write HOST:PORT, or [IPV6]:PORT")
        if not port:
            if default_port is None:
                raise ValueError(f"address {text!r} has no port: write HOST:PORT")
            return cls(host, default_port)
        if not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"address {text!r} has a bad port: write HOST:PORT with a port from 0 to 65535")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def endpoint(self) -> str:
        """The ZeroMQ endpoint, ``tcp://host:port``."""
        return f"tcp://{self}"

    @property
    def is_loopback(self) -> bool:
        return self.host == "localhost" or self.host == "::1" or self.host.startswith("127.")


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """(boot epoch, incarnation): which of two statements about one node is newer. The higher one wins.

    ``epoch`` grows with each boot: max(persisted + 1, wall clock in ms), so neither a clock step nor a lost disk breaks
    the order.  ``incarnation`` grows within a boot, each time the node refutes a suspicion or changes what it says of
    itself.
    """

    epoch: int
    incarnation: int


# What a worker says of itself. `suspect`, `dead` and `left` are other peers' views of it and never self-declared.
STARTING = "starting"
LOADING = "loading"
READY = "ready"
DRAINING = "draining"
STALLED = "stalled"
INCOMPATIBLE = "incompatible"
SUSPECT = "suspect"
DEAD = "dead"
LEFT = "left"

AGGREGATED = "aggregated"
PREFILL = "prefill"
DECODE = "decode"
FRONTEND = "frontend"
ROLES = (AGGREGATED, PREFILL, DECODE)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model that a worker serves, as gossiped.

    ``card`` is the model card's content hash (32 hex digits) by which a frontend fetches it; ``fingerprint`` is what
    two workers must share to be routed together (block size, card, weights, hash parameters).  ``moves_kv`` names what
    carries KV blocks to another worker, several joined by "+" ("p2p-nixl+p2p-tcp", or an engine's own connector:
    "nixl"): see :func:`moves_alike` and :func:`only_pulls`; "" means nothing does.
    """

    name: str
    card: str
    fingerprint: str
    block_size: int
    context: int
    ranks: int = 1
    kv_events: bool = False
    moves_kv: str = ""


def only_pulls(moves_kv: str) -> bool:
    """Whether a decode worker that says this as ``moves_kv``, with a "!" at its end, computes no prompts at all
    (SGLang's): each has to be handed over to it, while a prefill worker computes it, and can be so only once."""
    return moves_kv.endswith("!")


def moves_alike(one: str, other: str) -> bool:
    """Whether of two workers that say this as ``moves_kv``, one can hand its KV blocks over to the other."""
    return bool(one) and (one == other or not set(one.split("+")).isdisjoint(other.split("+")))


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What a peer says of itself in gossip: opaque bytes to the membership core, at most 1 kB encoded.

    ``requests_port`` and ``events_port`` are on the same host as the control address; 0 means it is no worker.
    """

    name: str
    version: str
    role: str = FRONTEND
    engine: str = "none"
    engine_version: str = ""
    state: str = STARTING
    detail: str = ""
    progress: float = 0.0
    models: tuple[ServedModel, ...] = ()
    requests_port: int = 0
    events_port: int = 0
    http: str = ""


@dataclass(slots=True)
class Load:
    """The load of one routing target (a worker's data-parallel rank) at one moment, and its measured speed.

    Blocks are KV blocks of the engine's block size; ``active_blocks`` are held by sequences, a shared one counted once.
    ``prefill_tokens_queued`` are the prompt tokens still to compute: those found in the prefix cache do not count.
    ``queued`` requests are waiting for the engine to admit them. Speeds are 0 until measured.
    """

    active_requests: int = 0
    active_blocks: int = 0
    queued: int = 0
    kv_used: int = 0
    kv_total: int = 0
    prefill_tokens_queued: int = 0
    prefill_tps: float = 0.0
    itl_ms: float = 0.0
    itl_per_block_ms: float = 0.0
    """What one more active block adds to the time between two tokens."""
    block_bytes: int = 0
    """Of one KV block as it is moved; 0: our transfer cannot take any from here."""
    pull_bps: float = 0.0
    """Bytes a second of this worker's reads from others, or tokens a second where its engine moves KV by itself (and
    ``block_bytes`` is 0); 0: none measured, or not able to."""
    work_s: float = 0.0
    """Seconds of prefill taken on, those of long ago for less (:data:`p2pdyn.constants.WORK_MEMORY_S`); 0 until the
    speed is measured."""
    slots: int = 0
    """Requests that the engine runs at a time; 0: not known."""


@dataclass(slots=True)
class SamplingParams:
    """How to generate, after HTTP validation: engines may trust ranges. Defaults mean "not asked for".

    ``logprobs`` is None (off) or the number of alternatives a token (0: only the chosen token's).  ``seed`` None: the
    frontend draws one, so that a migrated request continues the same stream.  ``guided`` is
    ``{"json"|"regex"|"grammar"|"choice": ...}``.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guided: dict[str, object] | None = None
    priority: int = 0
    cache_salt: str = ""
    lora: str = ""
    extra: dict[str, object] = field(default_factory=dict)
