"""The process's file descriptors: whether there are enough for another client."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

QUIET_S = 5.0
"""Without a refusal for this long there are enough again."""


def descriptor_limit() -> int:
    """How many the process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**20 if soft == resource.RLIM_INFINITY else soft


class Descriptors:
    """Keeps the last ``spare`` for the mesh, whose sockets must not fail for the sake of one more client.

    A new descriptor is always the lowest that is free (POSIX), so its number tells how many are taken below the limit,
    and nothing has to be counted.
    """

    def __init__(self, spare: int) -> None:
        self.limit = descriptor_limit()
        self._spare = spare
        self._refused = 0
        self._last: float | None = None
        """When a connection was refused, until there are enough again."""

    def short(self, descriptor: int, now: float) -> bool:
        """Whether a connection on ``descriptor`` is one too many; said in the log once, with the mend."""
        if descriptor < self.limit - self._spare:
            return False
        if self._last is None:
            log.error(
                "out of file descriptors: new HTTP connections are refused, open ones go on; raise the limit of %d "
                "(ulimit -n, LimitNOFILE= in a systemd unit), or add a frontend",
                self.limit,
            )
        self._last = now
        self._refused += 1
        return True

    def look(self, now: float) -> None:
        """Called a few times a second: says so when it is over."""
        if self._last is not None and now - self._last > QUIET_S:
            log.warning("file descriptors are free again; %d connections were refused", self._refused)
            self._last, self._refused = None, 0
