"""Logging of the commands: stderr, one line a message."""

from __future__ import annotations

import logging
import sys


class OneLine(logging.Formatter):
    """A message's own line breaks become visible; a traceback (a defect) keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\n", "\\n")


def set_up_logging(level: str) -> None:
    """``level``: one of p2pdyn.settings.LOG_LEVELS."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
