"""Reads along in what an engine's processes print: how far loading is, and what went wrong.

Engines tell neither in any other way: a constructor returns when everything is loaded, or raises "see above".
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence

READ = 1 << 16
LINE = re.compile(rb"[\r\n]+")
"""Progress bars end their lines with a carriage return."""

Stage = tuple[re.Pattern[bytes], float, str]
"""(lines of this form, how far loading is then, what is being done)."""


class LogTap:
    """From here on all that this process and its children print to ``descriptors`` passes through here, on its way to
    stderr. ``on_stage(fraction, what)`` is called in a thread of ours, with rising fractions. ``error`` finds what an
    exception says, unless it has one of the ``vague`` words."""

    def __init__(
        self,
        on_stage: Callable[[float, str], None],
        stages: Sequence[Stage],
        error: re.Pattern[bytes],
        vague: Sequence[bytes] = (),
        descriptors: Sequence[int] = (1, 2),
    ) -> None:
        self.error = ""
        """The last exception that was logged and says something."""
        self._on_stage, self._stages = on_stage, stages
        self._error, self._vague = error, vague
        self._fraction = 0.0
        self._out = os.dup(2)
        self._read, write = os.pipe()
        for descriptor in descriptors:
            os.dup2(write, descriptor)
        os.close(write)
        threading.Thread(target=self._run, name="engine-log", daemon=True).start()

    def _run(self) -> None:
        rest = b""
        while data := os.read(self._read, READ):
            *lines, rest = LINE.split(rest + data)
            for line in lines:
                self.look(line)
            written = 0
            while written < len(data):
                written += os.write(self._out, data[written:])

    def look(self, line: bytes) -> None:
        for pattern, fraction, what in self._stages:
            if fraction > self._fraction and pattern.search(line):
                self._fraction = fraction
                self._on_stage(fraction, what)
        found = self._error.search(line)
        if found and not any(words in line for words in self._vague):
            self.error = found[1].decode(errors="replace").strip()[:400]
