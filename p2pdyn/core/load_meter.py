"""What a worker measures of its engine's work and tells the routers."""

from __future__ import annotations

from collections.abc import Iterable

from p2pdyn.core.disagg import OVERHEAD_S, TOKEN_PULL_S
from p2pdyn.core.speed import PullMeter, SpeedMeter
from p2pdyn.core.types import Load, NodeId
from p2pdyn.wire.events import LoadEvent


class LoadMeter:
    """Pure; ``now`` in seconds, keys are those by which the engine knows its sequences."""

    def __init__(self, node: NodeId) -> None:
        self._node = node
        self._speed = SpeedMeter()
        self._pulls = PullMeter(TOKEN_PULL_S, OVERHEAD_S)
        self._blocks = 0
        """In use after the last step: during the next one, at whose end those of what has ended are free again."""
        self._seq = 0

    def submitted(self, key: int, tokens: int, uncached: int, now: float) -> None:
        """A sequence of ``tokens``, of which the router expects ``uncached`` to be computed; 0: it does not know."""
        self._speed.submitted(key, tokens, uncached, now)

    def pulls(self, key: int, tokens: int, now: float) -> None:
        """The engine fetches that many tokens' KV for it from another worker by itself."""
        self._pulls.begun(key, tokens, now)

    def gone(self, key: int) -> None:
        """Aborted."""
        self._speed.gone(key)
        self._pulls.gone(key)

    def clear(self) -> None:
        """The engine has ended."""
        self._speed.clear()

    def computed(self, key: int, cached: int, now: float) -> None:
        """A prompt that is to be handed over."""
        self._speed.first_tokens(((key, cached),), now)

    def stepped(self, started: Iterable[tuple[int, int]], outputs: int, blocks: int, now: float, freed: int) -> None:
        """An engine step: (key, cached tokens) of those that got their first token, how many sequences took part, KV
        blocks in use now; places in its batch that ``freed`` sequences left to others who waited, -1 if nobody did."""
        if started:
            self._speed.first_tokens(started, now)
            for key, _ in started:
                self._pulls.first_token(key, now)
        if freed >= 0:
            self._speed.freed(freed, now)
        else:
            self._speed.unhindered()
        took = self._speed.step(outputs, now)
        if took:
            self._speed.sample(took, self._blocks)
        self._blocks = blocks

    @property
    def patience_s(self) -> float:
        """Seconds without a step after which an engine with work stands still."""
        return self._speed.patience_s

    def pull_bps(self, now: float) -> float:
        """Tokens a second that the engine fetches by itself."""
        return 1.0 / max(self._pulls.token_s(now), 1e-9)

    def event(
        self, epoch: int, load: Load, open_: int, block_bytes: int, pull_bps: float, now: float, slots: int = 0
    ) -> LoadEvent:
        """The next load event. ``load`` is the engine's own, ``open_`` the requests that are open on this worker;
        ``block_bytes`` and ``pull_bps`` say what it takes to move its KV blocks and others' to it, 0 if none can;
        ``slots`` is how many requests the engine runs at a time."""
        speed = self._speed
        self._seq += 1
        return LoadEvent(
            self._node,
            epoch,
            self._seq,
            max(load.active_requests, open_ - load.queued),
            load.active_blocks,
            load.queued,
            load.kv_used,
            load.kv_total,
            # The engine knows what it has computed, the routers what is cached: both are upper bounds.
            min(load.prefill_tokens_queued or speed.backlog, speed.backlog),
            # What an engine says of itself is no measure beside others' measured: it is for the time before the first.
            speed.prefill_tps if speed.timed else load.prefill_tps,
            speed.itl_ms(load.active_blocks) or load.itl_ms,
            speed.itl_per_block_ms or load.itl_per_block_ms,
            block_bytes=block_bytes,
            pull_bps=pull_bps,
            work_s=speed.work_s(now),
            slots=slots,
        )
