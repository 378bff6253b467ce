"""What processes take while they live: resident memory, descriptors, threads."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from chaos.cluster import Cluster
from chaos.verdict import Growth, Sample, growth

SAMPLE_S = 1.0


@dataclass
class Life:
    """One process's samples."""

    name: str
    pid: int
    samples: list[Sample] = field(default_factory=list)


class Vitals:
    """``with Vitals(cluster) as vitals``: samples every process that is a peer's at the time."""

    def __init__(self, cluster: Cluster) -> None:
        self.lives: dict[int, Life] = {}
        self._cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vitals")

    def __enter__(self) -> Vitals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def descriptors(self) -> dict[str, int]:
        """Open now, by peer."""
        return {peer.name: _sample(peer.node.process.pid).descriptors for peer in self._cluster.peers.values()}

    def growth(self) -> dict[str, Growth]:
        """By process, of those that lived long enough to tell."""
        grown = {f"{life.name}/{life.pid}": growth(life.samples) for life in self.lives.values()}
        return {name: one for name, one in grown.items() if one is not None}

    def keep(self, file: Path) -> None:
        """All samples as CSV: what a growth looked like."""
        with file.open("w") as out:
            print("name", "pid", *Sample._fields, sep=",", file=out)
            for life in self.lives.values():
                for sample in life.samples:
                    print(life.name, life.pid, *sample, sep=",", file=out)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            for peer in list(self._cluster.peers.values()):
                if peer.node.ready:
                    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        self._take(peer.name, peer.node.process.pid)

    def _take(self, name: str, pid: int) -> None:
        self.lives.setdefault(pid, Life(name, pid)).samples.append(_sample(pid))


def _sample(pid: int) -> Sample:
    process = psutil.Process(pid)
    with process.oneshot():
        return Sample(time.monotonic(), process.memory_info().rss, process.num_fds(), process.num_threads())
