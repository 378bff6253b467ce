"""Who watches whom in a large cluster: the successors on K pseudo-random rings, as Rapid does it.

Suresh et al., "Stable and Consistent Membership at Scale with Rapid", USENIX ATC 2018, section 4.1: each node has
exactly K watchers and K subjects, and the graph is an expander, so that what each node tells its subjects once floods
the cluster in a few steps. The graph changes with the members alone: its links stay open, while probes of members drawn
at random pay a handshake each.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

from p2pdyn.core.types import NodeId

_CIRCLE = 2**64


@lru_cache(maxsize=65536)
def _places(node: NodeId, rings: int) -> tuple[int, ...]:
    """Where a node stands on each ring; the same for whoever asks."""
    digest = blake2b(node.encode(), digest_size=8 * rings).digest()
    return tuple(int.from_bytes(digest[8 * ring : 8 * ring + 8], "little") for ring in range(rings))


class Rings:
    """This node's successor on each of up to 8 rings."""

    def __init__(self, own: NodeId, count: int) -> None:
        self._count = count
        self._own = _places(own, count)
        self._nearest: list[tuple[int, NodeId] | None] = [None] * count

    def joined(self, node: NodeId) -> None:
        for ring, place in enumerate(_places(node, self._count)):
            distance = (place - self._own[ring]) % _CIRCLE
            nearest = self._nearest[ring]
            if nearest is None or distance < nearest[0]:
                self._nearest[ring] = distance, node

    def gone(self, node: NodeId, left: Iterable[NodeId]) -> None:
        """``left`` are all that remain."""
        lost = [ring for ring, nearest in enumerate(self._nearest) if nearest is not None and nearest[1] == node]
        if lost:
            everybody = [(_places(other, self._count), other) for other in left]
            for ring in lost:
                own = self._own[ring]
                found = (((places[ring] - own) % _CIRCLE, other) for places, other in everybody)
                self._nearest[ring] = min(found, default=None)

    def successor(self, ring: int) -> NodeId | None:
        nearest = self._nearest[ring]
        return nearest[1] if nearest is not None else None

    def subjects(self) -> list[NodeId]:
        """Whom this node watches and tells its news, each once."""
        return list(dict.fromkeys(nearest[1] for nearest in self._nearest if nearest is not None))
