"""The cores have no sockets, clock, threads, event loop or codec: what importing them loads shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import p2pdyn

PROGRAM = """
import sys
before = set(sys.modules)
import p2pdyn.core, pkgutil, importlib
for module in pkgutil.iter_modules(p2pdyn.core.__path__, "p2pdyn.core."):
    importlib.import_module(module.name)
print(" ".join(sorted(set(sys.modules) - before)))
"""

FORBIDDEN = {
    "asyncio", "socket", "_socket", "select", "selectors", "ssl", "threading", "multiprocessing", "subprocess",
    "concurrent", "time", "sched", "zmq", "msgpack", "zeroconf", "uvloop", "numpy", "logging", "signal",
}  # fmt: skip


def test_importing_the_cores_loads_no_io() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _with_paths()], capture_output=True, text=True, check=True, timeout=30
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "p2pdyn" in loaded
    assert not loaded & FORBIDDEN


def _with_paths() -> str:
    """No site packages of its own (-S), so that nothing is loaded before; then the paths of this interpreter."""
    paths = [str(Path(p2pdyn.__file__).parent.parent), *sys.path]
    return f"import sys; sys.path[:] = {paths!r}\n{PROGRAM}"
