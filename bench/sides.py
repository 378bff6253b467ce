"""The two sides of the throughput bench as processes: p2pdyn and NVIDIA Dynamo, each with frontends and workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from free_ports import free_port

MODEL = "tiny"
BLOCK_SIZE = 16
KV_BLOCKS = 8192
START_S = 60.0


@dataclass
class Side:
    """Running processes of one side; `urls` are its frontends, `frontends` and `workers` their processes."""

    name: str
    folder: Path
    urls: list[str] = field(default_factory=list)
    frontends: list[subprocess.Popen[bytes]] = field(default_factory=list)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        return [*self.frontends, *self.workers]

    def log(self, name: str) -> IO[bytes]:
        return (self.folder / f"{name}.log").open("wb")

    def check_alive(self) -> None:
        """Raises SystemExit with the log's end when a process has ended."""
        for process in self.processes:
            if process.poll() is not None:
                logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log")))
                raise SystemExit(f"{self.name}: process {process.args!r} ended with {process.returncode}\n{logs}")

    def wait_serving(self) -> None:
        """Until every frontend lists the model."""
        deadline = time.monotonic() + START_S
        for url in self.urls:
            while not _lists_model(url):
                self.check_alive()
                if time.monotonic() > deadline:
                    raise SystemExit(
                        f"{self.name}: {url} does not list the model after {START_S:.0f} s; see {self.folder}"
                    )
                time.sleep(0.1)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    def memory_mb(self) -> dict[str, float]:
        """RSS and PSS summed over all processes of the side, children included [MB of 10^6 bytes]."""
        totals = {"Rss:": 0, "Pss:": 0}
        for pid in _tree([process.pid for process in self.processes]):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                words = line.split()
                if words[0] in totals:
                    totals[words[0]] += int(words[1])
        return {"rss_mb": round(totals["Rss:"] * 1024 / 1e6, 1), "pss_mb": round(totals["Pss:"] * 1024 / 1e6, 1)}

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far of the frontends and of the workers, children included."""
        return {"frontend": _cpu(self.frontends), "worker": _cpu(self.workers)}


def start_p2pdyn(folder: Path, model: Path, *, frontends: int, workers: int, router: str | None) -> Side:
    """Frontend nodes and sim workers, CURVE on, joined by seeds on loopback."""
    side = Side("p2pdyn", _fresh(folder))
    key = folder / "cluster.key"
    command = [sys.executable, "-m", "p2pdyn"]
    subprocess.run([*command, "keygen", str(key)], check=True, timeout=30, stdout=subprocess.DEVNULL)
    common = ["--listen", "127.0.0.1", "--port", "0", "--no-mdns", "--cluster-key", str(key), "--cluster", "bench"]
    seeds: list[str] = []
    for i in range(frontends + workers):
        name = f"frontend{i}" if i < frontends else f"worker{i - frontends}"
        own = [*command, "node", *common, "--name", name, "--data-dir", str(folder / name), *seeds]
        if i < frontends:
            own += ["--engine", "none", "--http", "127.0.0.1:0", *(["--router", router] if router else [])]
        else:
            own += ["--engine", "sim", "--model", str(model), "--served-model-name", MODEL, "--no-http"]
            own += ["--", "--speedup", "0", "--kv-blocks", str(KV_BLOCKS), "--block-size", str(BLOCK_SIZE)]
        process = subprocess.Popen(own, stdout=subprocess.PIPE, stderr=side.log(name))
        (side.frontends if i < frontends else side.workers).append(process)
        ready = _ready_line(side, process)
        seeds += ["--seed", ready["mesh"]] if not seeds else []
        if i < frontends:
            side.urls.append(ready["http"])
    side.wait_serving()
    return side


def start_dynamo(folder: Path, model: Path, venv: Path, *, frontends: int, workers: int) -> Side:
    """Dynamo's frontend and mocker workers (one process, as its mocker runs them), file discovery, tcp plane."""
    side = Side("dynamo", _fresh(folder))
    python = str(venv / "bin" / "python")
    env = {**os.environ, "DYN_FILE_KV": str(folder / "store"), "HF_HUB_OFFLINE": "1", "DYN_LOG": "warn"}
    (folder / "store").mkdir()
    planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
    mocker = [python, "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL, *planes]
    mocker += ["--num-workers", str(workers), "--speedup-ratio", "1000000", "--block-size", str(BLOCK_SIZE)]
    mocker += ["--num-gpu-blocks-override", str(KV_BLOCKS)]
    side.workers.append(_spawn(side, "mocker", mocker, env))
    for i in range(frontends):
        port = free_port()
        http = ["--http-host", "127.0.0.1", "--http-port", str(port)]
        router = ["--router-mode", "kv", "--kv-cache-block-size", str(BLOCK_SIZE)]
        command = [python, "-m", "dynamo.frontend", *http, *planes, *router]
        side.frontends.append(_spawn(side, f"frontend{i}", command, env))
        side.urls.append(f"http://127.0.0.1:{port}")
    side.wait_serving()
    return side


def _spawn(side: Side, name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=side.log(name), stderr=subprocess.STDOUT, env=env, cwd=side.folder)


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _ready_line(side: Side, process: subprocess.Popen[bytes]) -> dict[str, str]:
    """The fields of `ready node=... mesh=... http=... model=... role=...`."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + START_S
    seen = b""
    while time.monotonic() < deadline:
        seen += process.stdout.read() or b""
        found = re.search(rb"^ready (.*)\n", seen, re.MULTILINE)
        if found:
            return dict(word.split("=", 1) for word in found[1].decode().split())
        side.check_alive()
        time.sleep(0.02)
    raise SystemExit(f"{side.name}: no ready line after {START_S:.0f} s from {process.args!r}; see {side.folder}")


def _lists_model(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=2) as reply:
            return f'"{MODEL}"' in reply.read().decode()
    except OSError:
        return False


def _tree(pids: list[int]) -> list[int]:
    """The processes and all their descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = list(pids)
    for pid in found:
        found += parents.get(pid, [])
    return found


def _cpu(processes: list[subprocess.Popen[bytes]]) -> float:
    ticks = 0
    for pid in _tree([process.pid for process in processes]):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="p2pdyn-bench-", ignore_cleanup_errors=True)
