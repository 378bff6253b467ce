"""The peer's side of the engine host: start it, talk to it, notice its death, end it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from p2pdyn.core.types import Load
from p2pdyn.engines import frames
from p2pdyn.engines.base import (
    EngineError,
    EngineInfo,
    EngineOptions,
    EngineUsageError,
    Progress,
    Sequence,
    Step,
    TransferOrder,
)
from p2pdyn.engines.frames import (
    FrameBuffer,
    FrameError,
    frame,
    pack_options,
    pack_order,
    pack_sequence,
    unpack_info,
    unpack_load,
    unpack_step,
)
from p2pdyn.engines.memory import attach

log = logging.getLogger(__name__)

ASK_S = 3.0
"""After the end of its input an idle child exits in milliseconds; one amid a long step may need this long."""
TERM_S = 1.0
KILL_S = 5.0
"""After SIGKILL only a process stuck in the kernel remains; then it is left and logged."""
LAST_WORDS_S = 0.5
"""How long frames of a dead child are waited for, should a grandchild hold its socket open."""


class ChildRunner:
    """Drives an engine in a child process and process group of its own. See :class:`p2pdyn.engines.runner.Runner`."""

    def __init__(
        self,
        name: str,
        module: str,
        options: EngineOptions,
        on_step: Callable[[Step], None],
        on_death: Callable[[str], None],
    ) -> None:
        self.on_step = on_step
        self.on_death = on_death
        self.load = Load()
        self.memory: memoryview | None = None
        self.steps = 0
        self.last_step_s = 0.0
        self._name = name
        self._module = module
        self._options = options
        self._open: set[int] = set()
        self._work: list[Any] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._link: asyncio.Transport | None = None
        self._frames = FrameBuffer()
        self._reason = ""
        self._failure: type[EngineError] = EngineError
        self._over = False  # the death is told, or wanted

    @property
    def pid(self) -> int | None:
        """Of the child, and of its process group; None before start."""
        return None if self._process is None else self._process.pid

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    async def start(self, progress: Progress) -> EngineInfo:
        self._loop = asyncio.get_running_loop()
        self._progress = progress
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._exited = asyncio.Event()
        self._lost = asyncio.Event()
        kv_memory = _memory_file()
        try:
            await self._spawn(kv_memory)
            return self._attach(await self._ready, kv_memory)
        except BaseException:
            await self.close(ask=0.0)
            raise
        finally:
            if kv_memory >= 0:
                os.close(kv_memory)  # a mapping has its own

    def _attach(self, info: EngineInfo, kv_memory: int) -> EngineInfo:
        if info.block_bytes:
            try:
                self.memory = attach(info.kv_blocks, info.block_bytes, kv_memory)
            except (OSError, ValueError) as error:
                log.warning("KV blocks of this worker can not be moved: its memory is not shared (%s)", error)
                return replace(info, block_bytes=0)
        return info

    async def _spawn(self, kv_memory: int) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = _popen(theirs, kv_memory)
            self._pidfd = os.pidfd_open(self._process.pid)
            self._loop.add_reader(self._pidfd, self._on_exit)
            ours.setblocking(False)
            self._link, _ = await self._loop.create_unix_connection(lambda: _Link(self), sock=ours)
        except BaseException:
            ours.close()
            raise
        options = replace(self._options, kv_memory=kv_memory)
        self._link.write(frame(pack_options(self._name, self._module, options, os.getpid())))

    # ---- work

    def submit(self, sequences: list[Sequence]) -> None:
        if self._over:
            return
        if not self._open:
            self.last_step_s = self._loop.time()
        for sequence in sequences:
            self._open.add(sequence.key)
            self._queue(pack_sequence(sequence))

    def abort(self, keys: list[int]) -> None:
        for key in keys:
            if key in self._open:
                self._open.discard(key)
                self._queue(key)

    def transfer(self, orders: list[TransferOrder]) -> None:
        if not self._over:
            for order in orders:
                self._queue(pack_order(order))

    def _queue(self, item: object) -> None:
        if not self._work:
            self._loop.call_soon(self._flush)
        self._work.append(item)

    def _flush(self) -> None:
        work, self._work = self._work, []
        if work and self._link is not None and not self._link.is_closing():
            self._link.write(frame(work))

    # ---- frames from the child

    def on_data(self, data: bytes) -> None:
        try:
            for content in self._frames.feed(data):
                self._on_frame(content)
        except FrameError as error:
            self._reason = self._reason or f"the engine process sent what is no frame ({error}): it was ended"
            self._signal(signal.SIGKILL)

    def _on_frame(self, content: Any) -> None:
        match content:
            case [frames.STEP, *_]:
                self._on_step_frame(content)
            case [frames.LOAD, list(load)]:
                self.load = unpack_load(load)
            case [frames.PROGRESS, float(fraction), str(what)]:
                if not self._ready.done():
                    self._progress(fraction, what)
            case [frames.READY, *_]:
                self.last_step_s = self._loop.time()
                if not self._ready.done():
                    self._ready.set_result(unpack_info(content))
            case [frames.FAILED, str(reason), bool(usage)]:
                self._reason, self._failure = reason, EngineUsageError if usage else EngineError
            case _:
                raise FrameError("of no known kind")

    def _on_step_frame(self, content: list[Any]) -> None:
        if self._over:
            return
        step = unpack_step(content, self._open)
        self.load = unpack_load(content[-1])
        self.steps += 1
        self.last_step_s = self._loop.time()
        self._open.difference_update(step.ended())
        self.on_step(step)

    def on_lost(self) -> None:
        """End of the child's output: it is dead, or has closed its socket and will be."""
        self._lost.set()
        if self._exited.is_set():
            self._tell()
        else:
            self._loop.call_later(LAST_WORDS_S, self._signal, signal.SIGKILL)

    # ---- life and death

    def _on_exit(self) -> None:
        """The process is a zombie now: its number is still ours, so its group can be killed safely, then reap it."""
        assert self._process is not None
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._exited.set()
        if self._lost.is_set() or self._link is None:
            self._tell()
        else:
            self._loop.call_later(LAST_WORDS_S, self._tell)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None and not self._exited.is_set():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _tell(self) -> None:
        if self._over:
            return
        self._over = True
        assert self._process is not None
        self._open.clear()
        reason = self._reason or _how_it_ended(self._process.returncode)
        if not self._ready.done():
            self._ready.set_exception(self._failure(reason))
        else:
            self.on_death(reason)

    async def close(self, ask: float = ASK_S) -> None:
        """Ask for ``ask`` seconds, then SIGTERM, then SIGKILL, each to the whole group."""
        self._over = True
        self.memory = None
        if self._process is None:
            return
        if self._link is not None and not self._link.is_closing() and ask:
            self._flush()
            self._link.write_eof()
        for wait, then in ((ask, signal.SIGTERM), (TERM_S, signal.SIGKILL), (KILL_S, None)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._exited.wait()
            if self._exited.is_set():
                break
            if then is None:
                log.error("engine process %d does not end even by SIGKILL; it is left behind", self._process.pid)
            else:
                self._signal(then)
        if self._link is not None:
            self._link.abort()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._lost.wait()


def _memory_file() -> int:
    """For the engine's KV memory; it takes none until the engine gives it a size. -1 if there can be none."""
    try:
        return os.memfd_create("p2pdyn-kv")
    except OSError:
        return -1


def _popen(theirs: socket.socket, kv_memory: int) -> subprocess.Popen[bytes]:
    """Start the child (2 ms, vfork); what an engine prints goes to stderr, for stdout is the `ready` line's."""
    return subprocess.Popen(
        [sys.executable, "-m", "p2pdyn.engines.host", str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=[descriptor for descriptor in (theirs.fileno(), kv_memory) if descriptor >= 0],
        process_group=0,
    )


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"the engine process exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; if nobody sent it, the host may be out of memory" if -code == signal.SIGKILL else ""
    return f"the engine process was killed by {name}{hint}"


class _Link(asyncio.Protocol):
    def __init__(self, runner: ChildRunner) -> None:
        self._runner = runner

    def data_received(self, data: bytes) -> None:
        self._runner.on_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._runner.on_lost()
