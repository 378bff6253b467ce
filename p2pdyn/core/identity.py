"""Who is who: the order of statements about a node, and boot epochs."""

from __future__ import annotations


def next_epoch(persisted: int | None, wall_ms: int) -> int:
    """The epoch of this boot: above the last one even if the clock went back, and above it if the disk was lost."""
    return max((persisted or 0) + 1, wall_ms)
