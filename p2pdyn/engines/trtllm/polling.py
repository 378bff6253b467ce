"""What TensorRT-LLM tells only if it is asked: statistics, KV events, and whether it is alive."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from p2pdyn.engines.base import KvEvent
from p2pdyn.engines.hosted import one_line
from p2pdyn.engines.trtllm.events import Events
from p2pdyn.engines.trtllm.stats import Stats

log = logging.getLogger(__name__)

AT_ONCE = 4096
"""Events or iterations taken in one look, so that outputs get their turn."""
CALL_S = 5.0


class Poller:
    """``events`` None: they are off."""

    def __init__(self, llm: Any, stats: Stats, events: Events | None) -> None:
        self.found = False
        """The last look found something."""
        self._llm = llm
        self._stats = stats
        self._events = events
        self._trouble = ""
        """Why the last look failed."""

    async def look(self) -> tuple[bool, list[KvEvent]]:
        """(whether there was another iteration, KV events). Whatever goes wrong is logged, once as long as it lasts,
        and costs what is known of the cache."""
        try:
            async with asyncio.timeout(CALL_S):
                iterations = await _taken(self._llm.get_stats_async(timeout=0.0))
                told = [] if self._events is None else await _taken(self._llm.get_kv_cache_events_async(timeout=0.0))
        except Exception as error:
            if (trouble := one_line(error)) != self._trouble:
                log.warning("TensorRT-LLM's events and statistics cannot be read: %s", trouble)
            self.found, self._trouble = False, trouble
            return False, [] if self._events is None else self._events.forget()
        self.found, self._trouble = bool(iterations or told), ""
        stepped = [self._stats.take(one) for one in iterations]
        return any(stepped), [] if self._events is None else self._read(self._events, told)

    def _read(self, events: Events, told: list[dict[str, Any]]) -> list[KvEvent]:
        read = events.read(told)
        for problem in events.problems:
            log.warning("%s", problem)
        events.problems.clear()
        return read


async def _taken(results: Any) -> list[dict[str, Any]]:
    """What there is now of an iterable of TensorRT-LLM's. It says in three ways that it is empty, and stays so until it
    is told otherwise, or another prompt comes."""
    if (again := getattr(results, "mark_undone", None)) is not None:
        again()
    found: list[dict[str, Any]] = []
    with suppress(TimeoutError, asyncio.QueueEmpty):
        async for one in results:
            found.append(one)
            if len(found) >= AT_ONCE:
                break
    return found


async def ended(llm: Any) -> str:
    """Why TensorRT-LLM's executor does not go on, or nothing. What tells it has no public name."""
    executor = getattr(llm, "_executor", None)
    fatal = getattr(executor, "_fatal_error", None)
    if fatal is not None:
        return f"TensorRT-LLM's executor has failed: {one_line(fatal)}"
    check = getattr(llm, "_check_health", None) or getattr(executor, "check_health", None)
    if check is None:
        return ""
    try:
        async with asyncio.timeout(CALL_S):
            sound = bool(await asyncio.to_thread(check))
    except TimeoutError:
        return ""  # busy; one that stands still is noticed by its steps
    except Exception as error:
        return f"TensorRT-LLM's health check failed: {one_line(error)}"
    return "" if sound else "TensorRT-LLM's executor has ended"
