"""vLLM's scheduler statistics: the load report, and how often prefixes were found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from p2pdyn.core.types import Load


@dataclass(slots=True)
class RankStats:
    """One data-parallel rank. ``queries`` and ``hits`` count prompt tokens looked up in vLLM's own prefix cache and
    found there, ``external_*`` those that a KV connector was asked for and brought."""

    running: int = 0
    waiting: int = 0
    usage: float = 0.0
    queries: int = 0
    hits: int = 0
    external_queries: int = 0
    external_hits: int = 0


class Stats:
    """Collects what each rank tells after each of its steps, and calls ``on_step``."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.ranks: dict[int, RankStats] = {}
        self._on_step = on_step
        self._told = ""

    def logger(self, config: Any, rank: int = 0) -> StatLogger:
        """A stat logger of vLLM; AsyncLLM calls this once a rank."""
        own = self.ranks[rank] = RankStats()
        return StatLogger(own, self._on_step)

    def load(self, blocks: int, idle: bool) -> Load:
        """``blocks`` is the capacity of all ranks together. ``idle``: nothing is open, whatever was told last."""
        ranks = self.ranks.values()
        used = sum(round(rank.usage * blocks / len(self.ranks)) for rank in ranks)
        return Load(
            active_requests=0 if idle else sum(rank.running for rank in ranks),
            active_blocks=used,
            queued=0 if idle else sum(rank.waiting for rank in ranks),
            kv_used=used,
            kv_total=blocks,
        )

    def news(self) -> str:
        """A line for the log if anything was looked up since the last one."""
        totals = [
            sum(getattr(rank, name) for rank in self.ranks.values())
            for name in ("queries", "hits", "external_queries", "external_hits")
        ]
        line = "prefix cache: {} tokens asked, {} found; from other workers: {} asked, {} brought".format(*totals)
        if line == self._told or not totals[0]:
            return ""
        self._told = line
        return line


class StatLogger:
    """What vLLM calls a StatLoggerBase; not derived from it, so that vLLM need not be imported here."""

    def __init__(self, rank: RankStats, on_step: Callable[[], None]) -> None:
        self._rank = rank
        self._on_step = on_step

    def record(self, scheduler_stats: Any, iteration_stats: Any, *rest: Any, **named: Any) -> None:
        if scheduler_stats is None:
            return
        rank, stats = self._rank, scheduler_stats
        rank.running = stats.num_running_reqs
        rank.waiting = stats.num_waiting_reqs + getattr(stats, "num_skipped_waiting_reqs", 0)
        rank.usage = stats.kv_cache_usage
        rank.queries += stats.prefix_cache_stats.queries
        rank.hits += stats.prefix_cache_stats.hits
        external = stats.connector_prefix_cache_stats
        if external is not None:
            rank.external_queries += external.queries
            rank.external_hits += external.hits
        self._on_step()

    def log_engine_initialized(self) -> None:
        pass

    def log(self) -> None:
        pass

    def record_sleep_state(self, *state: Any) -> None:
        pass
