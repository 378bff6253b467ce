"""Processes that TensorRT-LLM starts outside the engine's process group: MPI's daemon begins a session of its own.

The engine host ends its group; what is left would keep a GPU's memory for ever.  So everything that is started here
carries a mark in its environment, which names the node's data folder, and that one node at a time uses.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

MARK = "P2PDYN_TRTLLM"


def mark(data_dir: Path) -> None:
    """From here on what this process starts is marked."""
    os.environ[MARK] = str(data_dir.absolute())


def end(data_dir: Path) -> list[int]:
    """Kill what carries the mark, outside this process's group; their process ids."""
    wanted, own = f"{MARK}={data_dir.absolute()}".encode(), os.getpgrp()
    ended = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it has ended, or is another user's
            pid = int(entry.name)
            if wanted in (entry / "environ").read_bytes().split(b"\0") and os.getpgid(pid) != own:
                os.kill(pid, signal.SIGKILL)
                ended.append(pid)
    return ended
