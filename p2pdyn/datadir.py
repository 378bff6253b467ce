"""A node's data dir: who it is across restarts, and that it runs once.

``identity.json`` holds the node id and the last boot epoch.  The epoch of a boot is max(last + 1, wall clock in ms): a
clock that stepped back cannot lower it.  A lost or damaged file gives a new identity, which nothing old can contradict.
``lock`` is held (flock) while the node runs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from p2pdyn.config import ConfigError, StartError
from p2pdyn.core.types import NodeId

log = logging.getLogger(__name__)

MAX_EPOCH = 2**53
"""A persisted epoch past it (the year 287396 in ms) is damage; below it JSON readers agree on its value."""


def wall_clock_ms() -> int:
    return int(time.time() * 1000)


class DataDir:
    """The open data dir: ``path``, ``node`` (16 hex digits) and this boot's ``epoch``. A context manager.

    Raises ConfigError when another process holds it, StartError when it cannot be written.
    """

    def __init__(self, path: Path, clock_ms: Callable[[], int] = wall_clock_ms) -> None:
        self.path = path
        self._lock = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._take_lock()
            self.node, last = self._read()
            self.epoch = max(last + 1, clock_ms())
            self._write()
        except OSError as why:
            self.close()
            raise StartError(_sentence(path, why)) from why
        except ConfigError:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            by = f"process {holder}" if holder.isdigit() else "another node"
            raise ConfigError(
                f"data dir {self.path} is in use by {by}: give this node its own --name or --data-dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _read(self) -> tuple[NodeId, int]:
        path = self.path / "identity.json"
        try:
            saved = json.loads(path.read_bytes())
            node, epoch = saved["node"], saved["epoch"]
            if re.fullmatch(r"[0-9a-f]{16}", node) and type(epoch) is int and 0 <= epoch < MAX_EPOCH:
                return NodeId(node), epoch
            raise ValueError("values out of range")
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as why:
            log.warning("%s is damaged (%s): this node gets a new id", path, why)
        return NodeId(secrets.token_hex(8)), 0

    def _write(self) -> None:
        """Durable before the epoch is used: a crash must never bring the same one back."""
        target, fresh = self.path / "identity.json", self.path / "identity.json.new"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"node": self.node, "epoch": self.epoch}, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(target)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def raise_epoch(self, epoch: int) -> None:
        """The cluster knew a later life of this id: begin above it the next time too."""
        if self.epoch < epoch < MAX_EPOCH:
            self.epoch = epoch
            try:
                self._write()
            except OSError as why:
                log.warning("%s", _sentence(self.path, why))

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> DataDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _sentence(path: Path, why: OSError) -> str:
    if why.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"data dir {path} cannot be written (disk full): free some space, or give --data-dir on another disk"
    return f"data dir {path} cannot be used ({why.strerror}): give a folder you may write with --data-dir"
