"""What SGLang's schedulers say of their load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from p2pdyn.core.types import Load


class Loads:
    """The newest snapshot of each data-parallel rank."""

    def __init__(self) -> None:
        self._ranks: dict[int, Any] = {}
        self._at: dict[int, float] = {}

    def update(self, snapshots: Iterable[Any]) -> bool:
        """Take over what the schedulers wrote last; whether any of them has done so since the last time, which tells
        that it goes on while a long prompt is computed."""
        news = False
        for one in snapshots:
            if one is not None and self._at.get(one.dp_rank) != one.timestamp:
                self._ranks[one.dp_rank], self._at[one.dp_rank] = one, one.timestamp
                news = True
        return news

    @property
    def settled(self) -> bool:
        """Nothing runs or waits, as they say themselves."""
        return not any(
            one.num_running_reqs or one.num_waiting_reqs or one.num_used_tokens for one in self._ranks.values()
        )

    def batch(self) -> int:
        """Sequences that may run at a time; 0 before anything was said."""
        return sum(one.max_running_requests for one in self._ranks.values())

    def load(self, page_size: int, blocks: int, idle: bool) -> Load:
        """``blocks`` is the capacity of all ranks together. ``idle``: nothing is open, whatever was told last."""
        ranks = self._ranks.values()
        used = sum(-(-one.num_used_tokens // page_size) for one in ranks)
        moving = sum(one.disaggregation.prefill_inflight_queue_reqs for one in ranks if one.disaggregation is not None)
        return Load(
            active_requests=0 if idle else sum(one.num_running_reqs for one in ranks) + moving,
            active_blocks=used,
            queued=0 if idle else sum(one.num_waiting_reqs for one in ranks),
            kv_used=used,
            kv_total=blocks,
        )
