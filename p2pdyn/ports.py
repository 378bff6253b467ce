"""Which ports a node listens on, as one line for its log; examples/multinode/README.md has the table for firewalls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from p2pdyn.config import Config
from p2pdyn.constants import UCX_PORTS
from p2pdyn.core.types import AGGREGATED, PREFILL, PeerInfo
from p2pdyn.serving import SIDE_PORT, TCP_PORT

OPEN = "neither encrypted nor authenticated"


def listing(config: Config, control: int, info: PeerInfo, env: Mapping[str, str]) -> str:
    """``control`` and what ``info`` names are bound. What an engine or a mover binds later is named by its fixed place
    or range; ``env`` may move UCX's."""
    return "; ".join(_ports(config, control, info, env))


def _ports(config: Config, control: int, info: PeerInfo, env: Mapping[str, str]) -> Iterator[str]:
    yield f"control {control}/tcp"
    if info.requests_port:
        yield f"requests {info.requests_port}/tcp"
        yield f"events {info.events_port}/tcp"
        yield from _kv_ports(config, env)
    if config.mdns:
        yield "mDNS 5353/udp"
    if info.http:
        yield f"HTTP {info.http.rpartition(':')[2]}/tcp"


def _kv_ports(config: Config, env: Mapping[str, str]) -> Iterator[str]:
    ucx = f"KV blocks over NIXL {env.get('UCX_TCP_PORT_RANGE') or UCX_PORTS}/tcp, UCX's ({OPEN})"
    if config.engine == "trtllm":
        if config.role != AGGREGATED:
            yield f"ports that TensorRT-LLM's cache transceiver chooses ({OPEN})"
    elif config.engine in ("vllm", "sglang"):
        if config.role != AGGREGATED:
            yield from _side_ports(config)
            yield ucx
    elif config.kv_transfer != "off":
        if config.kv_transfer != "nixl":
            yield f"KV blocks over tcp {_place(config, TCP_PORT)}"
        if config.kv_transfer != "tcp" and find_spec("nixl") is not None:
            yield ucx


def _side_ports(config: Config) -> Iterator[str]:
    place = _place(config, SIDE_PORT)
    if config.engine == "vllm":
        yield f"vLLM's NIXL side channel {place} and on, one a data-parallel rank ({OPEN})"
    else:
        if config.role == PREFILL:
            yield f"SGLang's bootstrap server {place} ({OPEN})"
        yield f"a port of SGLang's for each of its tensor-parallel ranks ({OPEN})"


def _place(config: Config, offset: int) -> str:
    return f"{config.port + offset}/tcp" if config.port else "a free port"
