"""Shared memory that engines' processes leave in /dev/shm when they are killed: hundreds of megabytes, and for ever.

Their own trackers would remove it, but end with the rest of the process group.  So its names are kept in the node's
data folder, which one node at a time uses, and the next start removes what an end by force has left.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

RECORD = "engine-shm"
SHARED = Path("/dev/shm")
NAME = re.compile(r"(psm_[0-9a-f]+|sem\.mp-\w+|sglang_loads_[\w.-]+\.shm)")


def record(data_dir: Path) -> None:
    """Write down what this process group has mapped."""
    names = {name for pid in _group() for name in _mapped(pid)}
    (data_dir / RECORD).write_text("\n".join(sorted(names)))


def remove(data_dir: Path) -> None:
    """Remove what was written down; those processes have ended."""
    file = data_dir / RECORD
    if not file.is_file():
        return
    for name in file.read_text().split():
        if NAME.fullmatch(name):
            (SHARED / name).unlink(missing_ok=True)
    file.unlink()


def _group() -> list[int]:
    """The processes of this process's group."""
    own = os.getpgrp()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[2]) == own:
                found.append(int(entry.name))
    return found


def _mapped(pid: int) -> set[str]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {found[1] for found in re.finditer(rf"{SHARED}/{NAME.pattern}", maps)}
