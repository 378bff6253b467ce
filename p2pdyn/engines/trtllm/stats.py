"""TensorRT-LLM's iteration statistics: the load report, and whether it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pdyn.core.types import Load


class Stats:
    """The newest iteration. ``blocks`` is 0 until told."""

    def __init__(self) -> None:
        self.blocks = 0
        self._iteration = -1
        self._running = self._queued = self._used = self._backlog = 0

    def take(self, told: Mapping[str, Any]) -> bool:
        """One iteration's statistics; whether they are of another one than those before."""
        cache, batch = told.get("kvCacheStats") or {}, told.get("inflightBatchingStats") or {}
        self.blocks = int(cache.get("maxNumBlocks") or self.blocks)
        self._used = int(cache.get("usedNumBlocks") or 0)
        self._running = int(told.get("numActiveRequests") or 0)
        self._queued = int(told.get("numQueuedRequests") or 0)
        self._backlog = int(batch.get("numQueuedCtxTokens") or 0)  # from 1.3.0rc13 on
        before, self._iteration = self._iteration, int(told.get("iter", self._iteration + 1))
        return self._iteration != before

    def load(self, idle: bool) -> Load:
        """``idle``: nothing is open; no iteration runs, and what the last one told is over."""
        if idle:
            self._running = self._queued = self._used = self._backlog = 0
        return Load(
            active_requests=self._running,
            active_blocks=self._used,
            queued=self._queued,
            kv_used=self._used,
            kv_total=self.blocks,
            prefill_tokens_queued=self._backlog,
        )
