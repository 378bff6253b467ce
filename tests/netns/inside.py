"""A thread of this process that lives on another host: its sockets, and the threads that it starts, are in that
network namespace."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

CLONE_NEWNET = 0x4000_0000


def enter(space: str) -> None:
    """Move the calling thread into the network namespace ``space``."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/run/netns/{space}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(handle, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {space}")
    finally:
        os.close(handle)


def thread_in(space: str) -> ThreadPoolExecutor:
    """One thread there."""
    return ThreadPoolExecutor(1, thread_name_prefix=space, initializer=enter, initargs=(space,))
