"""When the routers hear of one worker's load: several times a second, and sooner where that changes their choice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from p2pdyn.constants import LOAD_SETTLE_S, LOAD_SOON_S

TELL_TOKENS = 512
"""Prompts that long are told of within LOAD_SOON_S: other frontends must not send theirs to the same worker."""


class LoadEvents:
    """``publish`` sends the load as it is then; ``busy`` says whether any request is open."""

    def __init__(self, publish: Callable[[], None], busy: Callable[[], bool]) -> None:
        self._publish = publish
        self._busy = busy
        self._was_busy = False
        """As last told."""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def tell(self) -> None:
        self.close()
        self._was_busy = self._busy()
        self._publish()

    def submitted(self, tokens: int) -> None:
        """The engine was given that many tokens' prompts. From idle to busy, or a long prompt, is told; not each is,
        under light load that is twice a request."""
        if tokens >= TELL_TOKENS:
            self._within(LOAD_SOON_S)
        elif not self._was_busy:
            self._within(LOAD_SETTLE_S)

    def settle(self) -> bool:
        """Some request has ended: whether it was the last one, which is told."""
        idle = self._was_busy and not self._busy()
        if idle:
            self._within(LOAD_SETTLE_S)
        return idle

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _within(self, delay: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= self._loop.time() + delay:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(delay, self.tell)
