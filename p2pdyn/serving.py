"""What a node's worker half is made from, and what it tells of itself: pieces of :mod:`p2pdyn.node`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING

from p2pdyn.config import Config
from p2pdyn.constants import HASH_SEED
from p2pdyn.core.types import DECODE, PREFILL, READY, Address, NodeId, PeerInfo, ServedModel
from p2pdyn.datadir import DataDir
from p2pdyn.engines.base import EngineInfo, EngineOptions

if TYPE_CHECKING:
    from p2pdyn.net.mesh import Peer
    from p2pdyn.net.sockets import Sockets
    from p2pdyn.net.transfers import Owner
    from p2pdyn.transfer.base import Mover, Region

TCP_PORT = 3
"""Behind the node's base port: where the tcp mover serves KV blocks."""
SIDE_PORT = 4
"""... and where an engine's own connector exchanges its metadata (vLLM: one port a data-parallel rank from here on)."""


def engine_options(config: Config, data: DataDir, epoch: int, host: str) -> EngineOptions:
    """``host``: the address that other peers reach this one by."""
    return EngineOptions(
        config.model,
        config.served_model_name,
        config.engine_args,
        config.offline,
        data.path,
        data.node,
        epoch,
        config.role,
        host,
        config.port and config.port + SIDE_PORT,
    )


def served_model(info: EngineInfo, card_digest: str, kv_transfer: str) -> ServedModel:
    """As gossiped; ``kv_transfer``: which movers of ours carry its KV blocks, "off" if none does."""
    return ServedModel(
        *(info.model, card_digest, fingerprint(info, card_digest), info.block_size, info.context),
        ranks=info.ranks,
        kv_events=info.kv_events,
        moves_kv=info.moves_kv or _means(kv_transfer),
    )


def _means(kv_transfer: str) -> str:
    if kv_transfer == "off":
        return ""
    from p2pdyn.transfer.choose import means

    return "+".join([f"p2p-{name}" for name in means(kv_transfer)])


def fingerprint(info: EngineInfo, card_digest: str) -> str:
    """What two workers must share to be routed together: 16 hex digits over block size, card, weights and hash
    parameters."""
    parts = f"{info.block_size}/{card_digest}/{info.weights}/xxh3-64/{HASH_SEED}"
    return blake2b(parts.encode(), digest_size=8).hexdigest()


def mover(
    config: Config, sockets: Sockets, node: NodeId, epoch: int, host: str
) -> Callable[[Sequence[Region], Callable[[int], bool]], Mover]:
    """Makes what moves KV blocks, as ``--kv-transfer`` says, once their memory is known."""
    from p2pdyn.transfer.choose import choose

    address = Address(host, config.port and config.port + TCP_PORT)
    return partial(choose, config.kv_transfer, sockets, f"{node}-{epoch}", address)


def owner(peer: Peer, ours: PeerInfo) -> Owner | None:
    """A live worker that KV blocks may be read from; ``ours``: what this node says of itself."""
    from p2pdyn.net.transfers import Owner

    info = peer.info
    if peer.state != "alive" or not info.requests_port:
        return None
    return Owner(peer.version.epoch, Address(peer.address.host, info.requests_port), _feeds(info, ours))


def _feeds(info: PeerInfo, ours: PeerInfo) -> bool:
    """A prefill worker whose blocks this decode worker will read."""
    if not (ours.role == DECODE and info.role == PREFILL and info.state == READY):
        return False
    return not {(m.name, m.fingerprint) for m in info.models}.isdisjoint((m.name, m.fingerprint) for m in ours.models)
