"""Reads along in what vLLM's processes print: how far loading is, and what went wrong.

vLLM tells neither in any other way: its constructor returns when everything is loaded, or raises "see above".
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable

STAGES = (
    (re.compile(rb"Initializing a V\d+ LLM engine"), 0.25, "starting vLLM's engine core"),
    (re.compile(rb"Starting to load model"), 0.35, "loading weights"),
    (re.compile(rb"Loading weights took"), 0.6, "profiling"),
    (re.compile(rb"(GPU|CPU) KV cache size"), 0.8, "warming up"),
    (re.compile(rb"init engine \(profile"), 0.95, "starting"),
)
ERROR = re.compile(rb"ERROR.*?\] ((?:[\w.]+\.)?\w*(?:Error|Exception): .+)")
VAGUE = (b"See root cause above", b"EngineCore encountered an issue", b"WorkerProc initialization failed")
READ = 1 << 16


class LogTap:
    """From here on all that this process and its children print to stdout passes through here, on its way to stderr.
    ``on_stage(fraction, what)`` is called in a thread of ours, with rising fractions."""

    def __init__(self, on_stage: Callable[[float, str], None]) -> None:
        self._on_stage = on_stage
        self._fraction = 0.0
        self.error = ""
        """The last exception that was logged and says something."""
        self._read, write = os.pipe()
        os.dup2(write, 1)
        os.close(write)
        threading.Thread(target=self._run, name="vllm-log", daemon=True).start()

    def _run(self) -> None:
        rest = b""
        while data := os.read(self._read, READ):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self.look(line)
            written = 0
            while written < len(data):
                written += os.write(2, data[written:])

    def look(self, line: bytes) -> None:
        for pattern, fraction, what in STAGES:
            if fraction > self._fraction and pattern.search(line):
                self._fraction = fraction
                self._on_stage(fraction, what)
        found = ERROR.search(line)
        if found and not any(words in line for words in VAGUE):
            self.error = found[1].decode(errors="replace").strip()[:400]
