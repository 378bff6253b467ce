"""Idle sockets, slow-loris clients and large bodies beside an ordinary client: its TTFT before and meanwhile.

One JSON line:
    python bench/hostile_http.py [--idle 500] [--loris 100] [--requests 200]

A frontend and two `sim` workers as processes of their own. The ordinary client streams one request at a time, a
connection each; a loris sends its headers one byte a second and must be cut off by the header deadline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
from support.nodes import Cluster, NodeProcess, wait_for

from p2pdyn.net.curve import write_key_file

BODY = json.dumps(
    {"model": "sim", "messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 8, "stream": True}
).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
LARGE = 50 * 2**20


def ttft_ms(address: tuple[str, int]) -> float:
    """From connect to the first event with text."""
    start = time.perf_counter()
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        seen = b""
        while b'"content":"' not in seen:
            part = connection.recv(65536)
            assert part, f"closed early: {seen[:300]!r}"
            seen += part
        first = time.perf_counter() - start
        while connection.recv(65536):
            pass
    return first * 1000


def percentiles(address: tuple[str, int], requests: int) -> dict[str, float]:
    taken = sorted(ttft_ms(address) for _ in range(requests))
    return {"p50_ms": round(taken[len(taken) // 2], 2), "p99_ms": round(taken[int(len(taken) * 0.99)], 2)}


class Loris(threading.Thread):
    """Sends headers a byte a second on many connections, until all are cut off; ``cut`` are their ages in seconds."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        super().__init__(daemon=True)
        self.open = {socket.create_connection(address, timeout=20): time.monotonic() for _ in range(count)}
        self.cut: list[float] = []
        self.answers: set[str] = set()

    def run(self) -> None:
        sent = 0
        while self.open and sent < len(HEAD):
            for connection, since in list(self.open.items()):
                with contextlib.suppress(OSError):
                    connection.send(HEAD[sent : sent + 1])
                connection.setblocking(False)
                try:
                    answer = connection.recv(4096)
                except BlockingIOError:
                    continue
                except OSError:
                    answer = b""
                self.answers.add(answer[9:12].decode() or "closed")
                self.cut.append(time.monotonic() - since)
                connection.close()
                del self.open[connection]
            sent += 1
            time.sleep(1.0)


def large_body(address: tuple[str, int]) -> str:
    """The status of a 50 MB body that is announced honestly."""
    with socket.create_connection(address, timeout=20) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % LARGE)
            for _ in range(LARGE // 65536):
                connection.sendall(b" " * 65536)
        with contextlib.suppress(OSError):
            return connection.recv(4096)[9:12].decode()
    return "closed"


def resident_mb(node: NodeProcess) -> float:
    return float(round(psutil.Process(node.process.pid).memory_info().rss / 2**20, 1))


def run(idle: int, loris: int, requests: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "key"
        write_key_file(key)
        with Cluster(Path(folder), key) as cluster:
            frontend = cluster.frontend("f")
            for name in ("w1", "w2"):
                cluster.worker(name, seeds=[frontend])
            parts = urlsplit(frontend.url)
            address = (str(parts.hostname), int(parts.port or 0))
            wait_for(lambda: _ready(frontend), 20, "ready workers", every=0.2)
            percentiles(address, 50)
            memory = resident_mb(frontend)
            before = percentiles(address, requests)
            sockets = [socket.create_connection(address, timeout=20) for _ in range(idle)]
            slow = Loris(address, loris)
            slow.start()
            print("idle and slow clients are connected", file=sys.stderr)
            meanwhile = percentiles(address, requests)
            statuses = sorted({large_body(address) for _ in range(3)})
            slow.join(60)
            for connection in sockets:
                connection.close()
            after = percentiles(address, requests)
            return {
                "bench": "hostile_http",
                "idle": idle,
                "loris": loris,
                "ttft_before": before,
                "ttft_meanwhile": meanwhile,
                "ttft_after": after,
                "p99_ratio": round(meanwhile["p99_ms"] / before["p99_ms"], 2),
                "loris_answers": sorted(slow.answers),
                "loris_cut_after_s_max": round(max(slow.cut, default=-1.0), 1),
                "loris_left": len(slow.open),
                "large_body_status": statuses,
                "rss_before_mb": memory,
                "rss_after_mb": resident_mb(frontend),
            }


def _ready(frontend: NodeProcess) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{frontend.url}/v1/models", timeout=5) as answer:
        return any(model["ready_workers"] == 2 for model in json.load(answer)["data"])
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--idle", type=int, default=500)
    parser.add_argument("--loris", type=int, default=100)
    parser.add_argument("--requests", type=int, default=200)
    options = parser.parse_args()
    print(json.dumps(run(options.idle, options.loris, options.requests)))


if __name__ == "__main__":
    main()
