"""A running cluster and what hostile clients do to it: each input, the answer it got, and whether anybody else noticed.

The cluster is three processes (an endpoint with API keys, a prefill and a decode worker of `sim`, KV blocks over tcp),
CURVE on.  One ordinary client streams all the while; every answer of it has to be the right one.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from re import fullmatch

import orjson
import psutil

from p2pdyn.net.curve import Keypair, Security
from support.nodes import Cluster, NodeProcess, make_key, wait_for

API_KEY = "sk-hostile-list-1234567890"
GROWTH_MB, AGAIN_MB = 160.0, 64.0
"""What the largest bodies (32 MB), the buffers of a flood and the allocator may leave behind; and the same once more
(from round to round it goes up and down by 40 MB, as the allocator finds a place for one body or two)."""
SILENCE_S = 5.0
"""Longest an ordinary answer may take on a machine that is busy attacking itself."""
TOKENS = 24


@dataclass(frozen=True)
class Target:
    """Where the attacks go."""

    host: str
    http: int
    ports: dict[str, int]
    """Every ZeroMQ port of every process, by what it is for."""
    key: Keypair
    scale: float = 1.0
    """Of floods: 1 is the full list."""

    @property
    def where(self) -> tuple[str, int]:
        return self.host, self.http


@dataclass(frozen=True)
class Case:
    """One hostile input. ``attack`` says what became of it; ``wanted`` is a regular expression of the documented
    answer. ``slow``: it waits for a deadline, so all of these run side by side."""

    group: str
    name: str
    attack: Callable[[Target], str]
    wanted: str
    slow: bool = False

    @property
    def heavy(self) -> bool:
        """It brings much data: what it leaves behind shows when it comes again."""
        return " MB" in self.name


@dataclass(frozen=True)
class Outcome:
    case: Case
    answer: str
    undisturbed: str
    """Empty: nobody noticed; else what went wrong meanwhile."""

    @property
    def good(self) -> bool:
        return not self.undisturbed and fullmatch(self.case.wanted, self.answer) is not None


class Bystander(threading.Thread):
    """An ordinary client: one streamed greedy answer after another, each compared with the first."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self._target = target
        self._body = orjson.dumps(
            {"model": "sim", "messages": [{"role": "user", "content": "as ever"}], "max_tokens": TOKENS,
             "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        )  # fmt: skip
        self._over = threading.Event()
        self.trouble: list[str] = []
        self.slowest_s = 0.0
        self.answers = 0
        self._right = self.ask()
        assert not self._right.startswith("not an answer"), self._right

    def ask(self) -> str:
        """The text of one answer, and its count of tokens; a sentence where there is none."""
        head = request_head("/v1/chat/completions", len(self._body))
        with socket.create_connection(self._target.where, timeout=20) as one:
            one.sendall(head + self._body)
            data = b""
            while part := one.recv(65536):
                data += part
        events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
        texts, tokens = [], 0
        for event in map(orjson.loads, events):
            texts += [choice["delta"].get("content", "") for choice in event.get("choices", ())]
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if tokens != TOKENS or b"data: [DONE]" not in data:
            return f"not an answer: {data[:200]!r}"
        return "".join(texts)

    def run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                answer = self.ask()
            except OSError as error:
                answer = f"no answer: {error}"
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.answers += 1
            if answer != self._right:
                self.trouble.append(answer)
            self._over.wait(0.02)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def look(self) -> str:
        """What went wrong since the last look, after one more whole answer."""
        seen = self.answers
        wait_for(lambda: self.answers >= seen + 2, 60, "an ordinary answer")
        trouble, self.trouble = self.trouble, []
        slow, self.slowest_s = self.slowest_s, 0.0
        if trouble:
            return trouble[0]
        return f"an ordinary answer took {slow:.1f} s" if slow > SILENCE_S else ""


def request_head(path: str, length: int, *more: str, key: str = API_KEY) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "Connection: close", *more, "", ""]).encode()


def ports_of(node: NodeProcess) -> list[int]:
    """Every TCP port that the process listens on but its HTTP one."""
    http = int(node.url.rsplit(":", 1)[1]) if node.url != "off" else 0
    listening = psutil.Process(node.process.pid).net_connections("tcp")
    return sorted({c.laddr.port for c in listening if c.status == psutil.CONN_LISTEN} - {http})


class Range:
    """The cluster under attack."""

    def __init__(self, cluster: Cluster, folder: Path, scale: float = 1.0) -> None:
        cluster.key = make_key(folder)
        keys = folder / "api.keys"
        keys.write_text(f"# clients\n{API_KEY}\n")
        self._cluster = cluster
        self.frontend = cluster.frontend("f", "--api-key-file", str(keys))
        arguments = ("--kv-transfer", "tcp", "--", "--speedup", "0", "--context", "4096")
        prefill = cluster.worker("w1", "--role", "prefill", *arguments, seeds=[self.frontend])
        decode = cluster.worker("w2", "--role", "decode", *arguments, seeds=[self.frontend])
        self.nodes = [self.frontend, prefill, decode]
        wait_for(self.whole, 20, "three ready peers")
        host, _, port = self.frontend.url.rpartition("//")[2].rpartition(":")
        ports = {f"{name} {port}": port for name, node in zip(["f", "w1", "w2"], self.nodes, strict=True)
                 for port in ports_of(node)}  # fmt: skip
        assert len(ports) == 1 + 4 + 4, f"control; control, requests, events, KV of each worker: {ports}"
        self.target = Target(host, int(port), ports, Security.load(cluster.key).keys[0], scale)

    def whole(self) -> bool:
        report = self.frontend.peers(self._cluster.key)
        return [peer["state"] for peer in report["peers"]] == ["ready"] * 3

    def held(self) -> list[tuple[float, int]]:
        """Megabytes resident and descriptors, of each process."""
        processes = [psutil.Process(node.process.pid) for node in self.nodes]
        return [(process.memory_info().rss / 2**20, process.num_fds()) for process in processes]

    def left_behind(self, before: Sequence[tuple[float, int]], growth_mb: float = GROWTH_MB) -> str:
        """What the attacks since ``before`` cost for good; empty if nothing."""
        for node in self.nodes:
            if node.process.poll() is not None:
                return f"a peer ended: {node.stderr[-500:]}"
            if "Traceback" in node.stderr or "ERROR" in node.stderr:
                return f"a peer failed inside: {node.stderr[node.stderr.find('ERROR') :][:800]}"
        wait_for(self.whole, 30, "three ready peers")
        wait_for(lambda: all(now[1] <= was[1] + 8 for now, was in zip(self.held(), before, strict=True)), 30,
                 lambda: f"descriptors given back: {before} to {self.held()}")  # fmt: skip
        growth = [now[0] - was[0] for now, was in zip(self.held(), before, strict=True)]
        return f"memory grew by {[round(mb) for mb in growth]} MB" if max(growth) > growth_mb else ""

    def run(self, cases: Sequence[Case]) -> Iterator[Outcome]:
        """Try all, the slow ones side by side first, beside the ordinary client."""
        bystander = Bystander(self.target)
        bystander.start()
        try:
            slow = [case for case in cases if case.slow]
            with ThreadPoolExecutor(max(1, len(slow))) as pool:
                answers = [pool.submit(_try, case, self.target) for case in slow]
                for case in cases:
                    if not case.slow:
                        yield Outcome(case, _try(case, self.target), bystander.look())
                for case, answer in zip(slow, answers, strict=True):
                    yield Outcome(case, answer.result(), bystander.look())
        finally:
            bystander.stop()


def _try(case: Case, target: Target) -> str:
    try:
        return case.attack(target)
    except OSError as error:
        return f"the attack failed: {error}"


@contextlib.contextmanager
def attacked(folder: Path, scale: float = 1.0) -> Iterator[Range]:
    with Cluster(folder) as cluster:
        yield Range(cluster, folder, scale)
