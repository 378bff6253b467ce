"""Every test leaves nothing behind: no thread, no process, no socket, no ZeroMQ context."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

GRACE_S = 3.0

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell: the processes of tests would inherit it, and Ctrl-C not end them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _left_behind(before: tuple[set[int], set[int], Counter[str]]) -> list[str]:
    threads, children, descriptors = before
    found = [f"thread {thread.name}" for thread in threading.enumerate() if thread.ident not in threads]
    found += [f"process {child.pid}" for child in psutil.Process().children() if child.pid not in children]
    # A ZeroMQ socket or context holds event descriptors, so this finds them too.
    found += [f"{count} descriptors of {kind}" for kind, count in (_descriptors() - descriptors).items()]
    return found


def _descriptors() -> Counter[str]:
    kinds: Counter[str] = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if target.startswith("socket:") or "eventfd" in target or "eventpoll" in target:
                kinds["sockets" if target.startswith("socket:") else target] += 1
    return kinds


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = (
        {thread.ident for thread in threading.enumerate() if thread.ident is not None},
        {child.pid for child in psutil.Process().children()},
        _descriptors(),
    )
    yield
    deadline = time.monotonic() + GRACE_S
    while found := _left_behind(before):
        assert time.monotonic() < deadline, f"the test left behind: {', '.join(found)}"
        gc.collect()
        time.sleep(0.02)
