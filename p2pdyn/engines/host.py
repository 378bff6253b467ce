"""The engine host: a child process in which one engine loads and runs.

``python -m p2pdyn.engines.host FD`` reads its work from the socket FD and answers one frame an engine step
(:mod:`p2pdyn.engines.frames`).  It has no event loop: it waits, takes in everything that has arrived, and steps the
engine, so that an abort right behind its submit wins.  End of input, by the peer's wish or by its death, ends the
process.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any

from p2pdyn.engines import registry
from p2pdyn.engines.base import Engine, EngineError, EngineOptions, EngineUsageError, Step, death_reason
from p2pdyn.engines.frames import (
    FAILED,
    LOAD,
    PROGRESS,
    FrameBuffer,
    frame,
    pack_info,
    pack_load,
    pack_step,
    unpack_options,
    unpack_order,
    unpack_sequence,
)

PR_SET_PDEATHSIG = 1
READ = 1 << 18
"""Bytes taken from the socket at a time."""


class PeerGone(Exception):
    """End of input."""


class Inbox:
    """The peer's frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._frames = FrameBuffer()

    def watch(self, descriptor: int) -> None:
        """Have :meth:`take` return when this is readable, too; whose it is empties it."""
        self._poll.register(descriptor, select.POLLIN)

    def take(self, wait: float | None) -> list[Any]:
        """Wait up to ``wait`` seconds (None: for ever) for input, then take all frames there are. Raises PeerGone."""
        taken: list[Any] = []
        if not self._poll.poll(None if wait is None else wait * 1000):
            return taken
        while True:
            try:
                data = self._sock.recv(READ, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return taken
            except ConnectionError as error:
                raise PeerGone from error
            if not data:
                raise PeerGone
            taken.extend(self._frames.feed(data))


def main() -> None:
    """Serve the socket named on the command line; does not return."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    sock.setblocking(True)
    inbox = Inbox(sock)
    try:
        first, *work = inbox.take(None)
        name, module, parent, options = unpack_options(first)
        if options.kv_memory >= 0:
            os.set_inheritable(options.kv_memory, False)
        die_with(parent)
        run(name, module, options, sock, inbox, work)
    except (PeerGone, BrokenPipeError, ConnectionResetError):
        pass
    except Exception:
        traceback.print_exc()
    finally:
        end_group()


def die_with(parent: int) -> None:
    """Take the whole process group down with the peer, however it ends and whatever the engine has started."""

    signal.signal(signal.SIGTERM, lambda number, frame: end_group())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise PeerGone


def end_group() -> None:
    """End this process and all that the engine has started: with the peer dead nobody else would."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def run(name: str, module: str, options: EngineOptions, sock: socket.socket, inbox: Inbox, work: list[Any]) -> None:
    """Load, then serve until PeerGone; an exception of the engine is told to the peer."""
    engine: Engine | None = None

    def progress(fraction: float, what: str) -> None:
        sock.sendall(frame([PROGRESS, float(fraction), what]))

    try:
        engine = registry.create(module, options)
        info = engine.load(progress)
        sock.sendall(frame(pack_info(info)))
        serve(engine, sock, inbox, work)
    except (PeerGone, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        if not isinstance(error, EngineError):
            traceback.print_exc()
        sock.sendall(frame([FAILED, death_reason(name, error), isinstance(error, EngineUsageError)]))
    finally:
        if engine is not None:
            engine.close()


def serve(engine: Engine, sock: socket.socket, inbox: Inbox, work: list[Any]) -> None:
    """Run steps until PeerGone. An engine that computes elsewhere than in :meth:`Engine.step` has a ``wakeup_fd``,
    readable when a step became due by itself; step empties it."""
    clock = time.monotonic
    wakeup: int | None = getattr(engine, "wakeup_fd", None)
    if wakeup is not None:
        inbox.watch(wakeup)
    while True:
        now = clock()
        due = engine.next_step(now)
        work += inbox.take(None if due is None else max(0.0, due - now))
        now = clock()
        for batch in work:
            for item in batch:
                match item:
                    case int():
                        engine.abort(item, now)
                    case [str(), *_]:
                        engine.transfer(unpack_order(item), now)
                    case _:
                        engine.submit(unpack_sequence(item), now)
        due = engine.next_step(now)
        if due is not None and due <= now:
            step: Step = engine.step(now)
            sock.sendall(frame(pack_step(step, engine.load_report())))
        elif work:
            sock.sendall(frame([LOAD, pack_load(engine.load_report())]))
        work = []


if __name__ == "__main__":
    main()
