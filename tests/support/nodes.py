"""Real `p2pdyn node` processes for tests: started, waited for by their ready line, always ended."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from p2pdyn.core.types import Address
from p2pdyn.net.admin import AdminError, admin_call
from p2pdyn.net.curve import Security, write_key_file
from p2pdyn.net.sockets import Sockets

READY = re.compile(r"ready node=(\S+) mesh=(\S+) http=(\S+) model=(\S+) role=(\S+)")
ASK_S = 5.0
"""Longest wait for what a node says of its peers."""


def wait_for(condition: Callable[[], Any], timeout: float, what: str | Callable[[], str], every: float = 0.02) -> Any:
    """Poll until ``condition`` gives something true, and return it; AssertionError names ``what`` after ``timeout``."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what() if callable(what) else what}"
        time.sleep(every)


class NodeProcess:
    """One `p2pdyn` process. ``prefix`` runs it elsewhere (``ip netns exec NAME``); ``program`` is another way to start
    it."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        prefix: Sequence[str] = (),
        env: dict[str, str] | None = None,
        program: Sequence[str] = (sys.executable, "-m", "p2pdyn"),
    ) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.ready: dict[str, str] | None = None
        self.ready_at = 0.0
        self.process = subprocess.Popen(
            [*prefix, *program, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**_clean_environment(), **(env or {})},
        )
        self._readers = [
            threading.Thread(target=self._read_lines, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            match = READY.match(line)
            if match:
                self.ready_at = time.monotonic()
                self.ready = dict(zip(("node", "mesh", "http", "model", "role"), match.groups(), strict=True))
            self.lines.append(line.rstrip("\n"))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line.rstrip("\n"))

    @property
    def stderr(self) -> str:
        return "\n".join(self.errors)

    def wait_ready(self, timeout: float = 30.0) -> NodeProcess:
        wait_for(
            lambda: self.ready or self.process.poll() is not None, timeout, f"a ready line; stderr:\n{self.stderr}"
        )
        assert self.ready is not None, f"the node ended with {self.process.returncode}:\n{self.stderr}"
        return self

    @property
    def id(self) -> str:
        assert self.ready is not None
        return self.ready["node"]

    @property
    def mesh(self) -> str:
        assert self.ready is not None
        return self.ready["mesh"]

    @property
    def url(self) -> str:
        assert self.ready is not None
        return self.ready["http"]

    def peers(self, key: Path | None = None) -> dict[str, Any]:
        """What `p2pdyn peers --json` says of this node, asked with the cluster key in ``key``; AssertionError without
        an answer. That command itself takes longer to start than its question takes."""
        return ask_peers(self.mesh, key)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: a crash, not a leave."""
        self.process.kill()
        self.process.wait(10)

    def stop(self, timeout: float = 15.0) -> int:
        """SIGTERM, then SIGKILL; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for reader in self._readers:
            reader.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return self.process.returncode


def ask_peers(mesh: str, key: Path | None) -> dict[str, Any]:
    """The cluster as the node at ``mesh`` sees it; AssertionError without an answer."""

    async def call() -> dict[str, Any]:
        sockets = Sockets(Security.load(key) if key else Security.insecure(allow_remote=True))
        try:
            return await admin_call(sockets, Address.parse(mesh), "peers", {}, ASK_S)
        except (AdminError, TimeoutError, ConnectionError) as error:
            raise AssertionError(f"{mesh}: {error}") from None
        finally:
            sockets.close()

    return asyncio.run(call())


def make_key(folder: Path) -> Path:
    """A cluster key file in ``folder``."""
    key = folder / "cluster.key"
    write_key_file(key)
    return key


class Cluster:
    """Nodes on loopback with free ports, one data dir each; all ended on exit. ``key`` turns CURVE on."""

    def __init__(self, folder: Path, key: Path | None = None) -> None:
        self.folder = folder
        self.key = key
        self.nodes: list[NodeProcess] = []

    def start(
        self,
        name: str,
        *args: str,
        engine: str = "sim",
        seeds: Sequence[NodeProcess] = (),
        program: Sequence[str] = (sys.executable, "-m", "p2pdyn"),
    ) -> NodeProcess:
        """Start a node without waiting for it. ``args`` may end with ``--`` and engine arguments."""
        split = list(args).index("--") if "--" in args else len(args)
        command = ["node", "--name", name, "--engine", engine, "--port", "0", "--data-dir", str(self.folder / name)]
        command += ["--cluster-key", str(self.key), "--listen", "127.0.0.1"] if self.key else []
        for seed in seeds:
            command += ["--seed", seed.mesh]
        node = NodeProcess([*command, *args[:split], *args[split:]], program=program)
        self.nodes.append(node)
        return node

    def frontend(self, name: str, *args: str, seeds: Sequence[NodeProcess] = ()) -> NodeProcess:
        """A ready frontend without an engine on a free HTTP port."""
        return self.start(name, "--http", "127.0.0.1:0", *args, engine="none", seeds=seeds).wait_ready()

    def worker(self, name: str, *args: str, seeds: Sequence[NodeProcess] = ()) -> NodeProcess:
        """A ready `sim` worker without HTTP."""
        return self.start(name, "--no-http", *(args or ("--", "--speedup", "0")), seeds=seeds).wait_ready()

    def key_args(self) -> tuple[str, ...]:
        return ("--cluster-key", str(self.key)) if self.key else ()

    def __enter__(self) -> Cluster:
        return self

    def stop(self) -> None:
        """End all nodes, beside each other."""
        for node in self.nodes:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGCONT)
                node.process.terminate()
        for node in self.nodes:
            node.stop()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        if kind is not None:
            for node in self.nodes:
                print(f"--- {' '.join(node.process.args[-12:])}\n{node.stderr}", file=sys.stderr)  # type: ignore[index]


def _clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("P2PDYN_")}
