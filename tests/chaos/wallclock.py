"""A wall clock that can be stepped under a running process. libfaketime cannot be used: with the monotonic clock left
alone it makes ``clock_nanosleep`` fail, which is CPython's ``time.sleep``."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("wallclock.c")
COMPILE_S = 30.0


def missing() -> str:
    """Why clocks cannot be stepped here; empty when they can."""
    return "" if shutil.which("cc") else "needs cc (apt-get install gcc libc6-dev)"


def build(folder: Path) -> Path:
    """The shared object to preload."""
    library = folder / "wallclock.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, timeout=COMPILE_S)
    return library


class WallClock:
    """One process's clock. ``env`` is for its start."""

    def __init__(self, library: Path, file: Path) -> None:
        self._file = file
        self.step(0.0)
        self.env = {"LD_PRELOAD": str(library), "WALLCLOCK_OFFSET": str(file)}

    def step(self, seconds: float) -> None:
        """Set it so far from the true time, in place: the file is mapped by the process."""
        with open(self._file, "r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=q", round(seconds * 1e9)))
