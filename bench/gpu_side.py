"""Servers as processes: engines' own and p2pdyn's nodes, waited for with a limit, ended with all that they started."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from free_ports import free_port
from gpu_engines import Engine

READY = re.compile(rb"^ready node=(\S+) mesh=(\S+) http=(\S+)", re.MULTILINE)
PROGRESS_S = 15.0
TERM_S = 12.0
TAIL = 6000


class BenchError(Exception):
    """A sentence on why a stage has no result."""


class Server:
    """A process and its log. ``url`` and ``mesh`` are known once it is ready. One that is no node is ready when
    ``health``, a path at ``url``, answers 200."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, env: dict[str, str], url: str = "", health: str = ""
    ) -> None:
        self.name, self.url, self.mesh, self.id = name, url, "", ""
        self.health = health
        self.log = folder / f"{name}.log"
        self.started = time.monotonic()
        self.start_s = 0.0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def ready(self) -> bool:
        """Raises BenchError when the process has ended."""
        if self.start_s:
            return True
        if self.process.poll() is not None:
            raise BenchError(f"{self.name} ended with {self.process.returncode}: {self.complaint()}")
        if self.health:
            done = _answers(self.url + self.health)
        else:
            found = READY.search(self.log.read_bytes())
            if found:
                self.id, self.mesh, self.url = (group.decode() for group in found.groups())
            done = found is not None
        if done:
            self.start_s = time.monotonic() - self.started
        return done

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        lines = self.text()[-2000:].strip().splitlines()
        return lines[-1][-160:] if lines else "nothing yet"

    def complaint(self) -> str:
        """The last lines that look like a reason."""
        lines = self.text().splitlines()
        told = [line for line in lines if re.search(r"Error|error:|Exception|ERROR", line)] or lines
        return " | ".join(line.strip()[-300:] for line in told[-4:])


class Servers:
    """All processes of a stage. Leaving the context ends them and every process that they have started. With
    ``serial_s`` each is started only when those before it serve, for which each has so many seconds."""

    def __init__(self, folder: Path, env: dict[str, str], serial_s: float = 0.0) -> None:
        self.folder = folder
        self.serial_s = serial_s
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("P2PDYN_")} | env
        self.all: list[Server] = []

    def __enter__(self) -> Servers:
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        stop([server.process for server in self.all])

    def own(self, engine: Engine, model: Path, flags: Sequence[str], env: dict[str, str]) -> Server:
        """The engine's own OpenAI server."""
        port = free_port()
        command = [*engine.serve(model, port), *flags]
        return self._start(f"own-{engine.name}", command, env, f"http://127.0.0.1:{port}", engine.health)

    def program(self, name: str, command: Sequence[str], env: dict[str, str]) -> Server:
        """One that ends by itself."""
        return self._start(name, command, env)

    def node(
        self,
        name: str,
        *options: str,
        flags: Sequence[str] = (),
        env: dict[str, str] | None = None,
        program: Sequence[str] = ("-m", "p2pdyn"),
    ) -> Server:
        """A p2pdyn node; ``flags`` go behind ``--``."""
        command = [sys.executable, *program, "node", "--name", name, "--port", "0", "--no-mdns", "--offline"]
        command += ["--data-dir", str(self.folder / f"{name}.data"), *options, *(("--", *flags) if flags else ())]
        return self._start(name, command, env)

    def key(self) -> tuple[str, ...]:
        """Settings of a cluster with CURVE on."""
        key = self.folder / "cluster.key"
        if not key.exists():
            run = [sys.executable, "-m", "p2pdyn", "keygen", str(key)]
            subprocess.run(run, check=True, timeout=60, stdout=subprocess.DEVNULL, env=self.env)
        return ("--cluster-key", str(key), "--listen", "127.0.0.1")

    def wait(self, servers: Iterable[Server], limit_s: float) -> None:
        """Until all of them serve. Raises BenchError."""
        waiting = list(servers)
        deadline, told = time.monotonic() + limit_s, time.monotonic()
        while waiting := [server for server in waiting if not server.ready()]:
            now = time.monotonic()
            if now > deadline:
                states = "; ".join(f"{server.name}: {server.last_line()}" for server in waiting)
                raise BenchError(f"not ready after {limit_s:.0f} s: {states}")
            if now - told > PROGRESS_S:
                told = now
                for server in waiting:
                    say(f"waiting for {server.name}, {now - server.started:.0f} s: {server.last_line()}")
            time.sleep(0.2)

    def _start(
        self, name: str, command: Sequence[str], env: dict[str, str] | None, url: str = "", health: str = ""
    ) -> Server:
        if self.serial_s:
            self.wait(self.all, self.serial_s)
        server = Server(name, command, self.folder, self.env | (env or {}), url, health)
        self.all.append(server)
        return server


def until(condition: Callable[[], Any], limit_s: float, what: str) -> Any:
    """Poll until ``condition`` gives something true, and return it. Raises BenchError."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise BenchError(f"not within {limit_s:.0f} s: {what}")
        time.sleep(0.1)
    return value


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, then SIGKILL for them and all that they have started."""
    started = _tree([process.pid for process in processes])
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + TERM_S
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
    for pid, born in _tree(list(started)).items() | started.items():
        if _born(pid) == born:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.wait(10)


def get(
    url: str, body: dict[str, Any] | None = None, limit_s: float = 60.0, headers: dict[str, str] | None = None
) -> Any:
    """JSON from a GET, or from a POST of ``body``. Raises BenchError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=limit_s) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise BenchError(f"{url} answered {error.code}: {error.read()[:500]!r}") from error
    except OSError as error:
        raise BenchError(f"{url}: {error}") from error


def say(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _tree(pids: Sequence[int]) -> dict[int, str]:
    """These processes and all that descend from them, each with the time of its birth."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = list(pids)
    for pid in found:
        found += children.get(pid, [])
    return {pid: _born(pid) for pid in found if _born(pid)}


def _born(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
