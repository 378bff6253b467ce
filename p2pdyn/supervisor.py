"""`p2pdyn node --workers`: this process is peer 0 (the endpoint, no engine), each worker a `p2pdyn node` of its own.

A worker keeps its identity in ``<data dir>/w<i>``, listens from BASE + 10 * i, joins through peer 0, and sees its own
GPUs only.  On a stop signal the workers finish their streams first, while peer 0 still carries them, then peer 0 goes.
What to do when is decided in :mod:`p2pdyn.core.supervise`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Coroutine
from dataclasses import replace

from p2pdyn import node
from p2pdyn.config import Config, ReadyInfo, StartError, child_environment
from p2pdyn.core.supervise import (
    Action,
    AllReady,
    BecameReady,
    Begin,
    Event,
    Exited,
    Finished,
    Kill,
    Revive,
    Say,
    Spawn,
    Stop,
    Supervision,
    Terminate,
    Tick,
)
from p2pdyn.core.types import READY, NodeId

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
FAILED = 1
"""Exit code."""
MAX_LINE = 64 * 1024
"""Bytes of a worker's output held until its line ends."""
READY_LINE = re.compile(r"ready node=(?P<node>\S+) mesh=\S+ http=\S+ model=(?P<model>\S+) role=(?P<role>\S+)")


async def run(config: Config, *, ready: node.Ready, stop: asyncio.Event, reload: asyncio.Event | None = None) -> int:
    """Run peer 0 and its workers until ``stop`` is set (again: at once); the exit code. ``reload`` is for all of them.

    Raises ConfigError and StartError as :func:`p2pdyn.node.run` does.
    """
    return await Supervisor(config, ready).run(stop, reload)


class Supervisor:
    """The shell: processes, pipes and signals."""

    def __init__(self, config: Config, ready: node.Ready) -> None:
        self.config = config
        self.core = Supervision(len(config.workers))
        self.processes: dict[int, asyncio.subprocess.Process] = {}
        self.served: dict[int, tuple[str, str]] = {}
        """Model and role of each worker, from its ready line."""
        self._nodes: dict[NodeId, int] = {}
        self._seen: dict[NodeId, str] = {}
        """Every peer's state as peer 0 sees it: a worker counts as ready once its requests can be routed."""
        self._early: dict[int, signal.Signals] = {}
        """Signals for workers that are just being started."""
        self._tell_ready = ready
        self._closed = self._drained = False
        self._info: ReadyInfo | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self, stop: asyncio.Event, reload: asyncio.Event | None = None) -> int:
        stop_peer, reload_peer = asyncio.Event(), asyncio.Event()
        peer = asyncio.create_task(
            node.run(
                self.config.frontend(),
                ready=self._peer_ready,
                stop=stop_peer,
                reload=reload_peer,
                seen=self._saw,
                crew=self,
            )
        )
        signals = [asyncio.create_task(self._stop_when(stop, stop_peer))]
        if reload is not None:
            signals.append(asyncio.create_task(self._reload_when(reload, reload_peer)))
        try:
            await asyncio.wait([peer, self._finished], return_when=asyncio.FIRST_COMPLETED)
            if self._finished.done():
                if not self._drained:
                    stop_peer.set()
                return await peer or self._finished.result()
            # Peer 0 has gone, or cannot go on: then neither can its workers' clients.
            self._handle(Stop())
            if self._info is not None:
                await self._finished
            return peer.result()
        finally:
            self._closed = True
            for task in signals:
                task.cancel()
            self._kill_all()
            peer.cancel()
            await asyncio.gather(*signals, peer, *self._tasks, return_exceptions=True)

    async def _stop_when(self, asked: asyncio.Event, stop_peer: asyncio.Event) -> None:
        """Peer 0 drains, and has its workers do so in time."""
        while True:
            await asked.wait()
            asked.clear()
            if self._info is None:  # it does not serve yet
                self._handle(Stop())
            stop_peer.set()

    async def _reload_when(self, asked: asyncio.Event, reload_peer: asyncio.Event) -> None:
        while True:
            await asked.wait()
            asked.clear()
            reload_peer.set()
            for process in self.processes.values():
                # One in its first second of life has no handler yet and ends: it is started again, with the new files.
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGHUP)
            self._handle(Revive())

    # What peer 0 does with its crew.

    def nodes(self) -> Collection[NodeId]:
        return self._nodes.keys()

    def running(self) -> int:
        return self.core.running

    def drain(self) -> None:
        self._drained = True
        if not self.core.stops:
            self._handle(Stop())

    def hurry(self) -> None:
        self._drained = True
        while self.core.stops < 2:
            self._handle(Stop())

    def _peer_ready(self, info: ReadyInfo) -> None:
        self._info = info
        self._handle(Begin())

    def _handle(self, event: Event) -> None:
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        for action in self.core.handle(event, loop.time()):
            self._carry_out(action)
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.core.next_deadline()
        self._timer = None if deadline is None else loop.call_at(deadline, self._handle, Tick())

    def _carry_out(self, action: Action) -> None:
        match action:
            case Spawn(worker):
                self._background(self._live(worker))
            case Terminate(worker):
                self._signal(worker, signal.SIGTERM)
            case Kill(worker):
                self._signal(worker, signal.SIGKILL)
            case AllReady():
                self._background(self._ready())
            case Say(worker, text):
                log.warning("worker %s %s", self.config.workers[worker].name, text)
            case Finished(code):
                if not self._finished.done():
                    self._finished.set_result(code)

    async def _ready(self) -> None:
        assert self._info is not None
        models = sorted({model for model, _ in self.served.values()})
        roles = sorted({role for _, role in self.served.values()})
        told = self._tell_ready(replace(self._info, model=",".join(models), role=",".join(roles)))
        if told is not None:
            await told

    async def _live(self, i: int) -> None:
        """One life of a worker, from its start to its end."""
        assert self._info is not None
        worker = self.config.workers[i]
        self._early.pop(i, None)
        command = [sys.executable, "-m", "p2pdyn", *arguments(self.config, i, self._info.mesh, os.getpid())]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=child_environment(os.environ, worker.gpus),
                start_new_session=True,  # Ctrl-C reaches peer 0 only, which drains the workers
            )
        except OSError as error:
            log.error("worker %s cannot be started: %s", worker.name, error.strerror)
            self._handle(Exited(i, 1))
            return
        self.processes[i] = process
        if early := self._early.pop(i, None):
            self._signal(i, early)
        assert process.stdout is not None
        assert process.stderr is not None
        await asyncio.gather(
            _lines(process.stdout, lambda line: self._said(i, line)),
            _lines(process.stderr, lambda line: _forward_line(worker.name, line)),
        )
        code = await process.wait()
        self.processes.pop(i, None)
        for peer in [peer for peer, worker in self._nodes.items() if worker == i]:
            # What is seen of it from now on is its past, until its next ready line.
            del self._nodes[peer]
        self._handle(Exited(i, code))

    def _said(self, i: int, line: str) -> None:
        if match := READY_LINE.fullmatch(line):
            self.served[i] = match["model"], match["role"]
            peer = NodeId(match["node"])
            self._nodes[peer] = i
            self._saw(peer, self._seen.get(peer, ""))
        else:
            _forward_line(self.config.workers[i].name, line)

    def _saw(self, peer: NodeId, state: str) -> None:
        self._seen[peer] = state
        if state == READY and peer in self._nodes:
            self._handle(BecameReady(self._nodes[peer]))

    def _signal(self, i: int, number: signal.Signals) -> None:
        process = self.processes.get(i)
        if process is None:
            self._early[i] = number
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    def _kill_all(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("supervising failed: please report it", exc_info=error)
            if not self._finished.done():
                self._finished.set_result(FAILED)


async def _lines(stream: asyncio.StreamReader, say: Callable[[str], None]) -> None:
    """Call ``say`` with each line; one longer than MAX_LINE comes in pieces."""
    rest = b""
    while chunk := await stream.read(MAX_LINE):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            say(line.decode(errors="replace"))
    if rest:
        say(rest.decode(errors="replace"))


def _forward_line(name: str, line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more: no reason to fail
        sys.stderr.write(f"{name} | {line}\n")


def arguments(config: Config, i: int, mesh: str, parent: int) -> list[str]:
    """The command line of worker ``i`` (from 0), everything said: its environment holds no settings."""
    worker = config.workers[i]
    options: dict[str, object] = {
        "engine": worker.engine,
        "model": worker.model,
        "served-model-name": worker.served_model_name,
        "role": worker.role,
        "listen": config.listen,
        "port": config.ports()[i + 1],
        "seed": mesh,
        "cluster": config.cluster,
        "cluster-key": config.cluster_key,
        "data-dir": config.data_dir / f"w{i + 1}",
        "name": worker.name,
        "kv-transfer": config.kv_transfer,
        "log-level": config.log_level,
        "supervised-by": parent,
    }
    # --option=value: a value may start with a dash.
    said = [f"--{option}={value}" for option, value in options.items() if value is not None]
    switches = ["--insecure"] * config.insecure + ["--offline"] * config.offline
    return ["node", "--no-http", "--no-mdns", *switches, *said, "--", *worker.engine_args]


def die_with_parent(parent: int) -> None:
    """Called by a worker as it starts: end at once, engine and all, when process ``parent`` ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        raise StartError("the supervisor ended before this worker started")
