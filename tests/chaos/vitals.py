"""What processes take while they live: resident memory, descriptors, threads."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil
from chaos.cluster import Cluster

SAMPLE_S = 1.0
WARM_UP_S = 90.0
"""Caches fill, and the allocator finds its size."""


class Sample(NamedTuple):
    at: float
    rss: int
    descriptors: int
    threads: int


@dataclass
class Life:
    """One process's samples."""

    name: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    def slopes(self, warm_up: float = WARM_UP_S) -> dict[str, float] | None:
        """Least-squares growth a minute of what came after the warm-up; None if that is less than a minute."""
        later = [sample for sample in self.samples if sample.at >= self.samples[0].at + warm_up]
        if len(later) < 60 / SAMPLE_S:
            return None
        return {
            "seconds": round(later[-1].at - later[0].at),
            "rss_kb": later[-1].rss // 1024,
            "rss_kb_a_minute": round(_slope([(s.at, s.rss / 1024) for s in later]) * 60, 1),
            "descriptors": later[-1].descriptors,
            "descriptors_a_minute": round(_slope([(s.at, s.descriptors) for s in later]) * 60, 2),
            "threads": later[-1].threads,
        }


def _slope(points: list[tuple[float, float]]) -> float:
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


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

    def now(self) -> dict[int, Sample]:
        """By process, of those that run."""
        return {peer.node.process.pid: _sample(peer.node.process.pid) for peer in self._cluster.peers.values()}

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


def descriptors_kept(before: dict[int, Sample], after: dict[int, Sample]) -> dict[int, list[int]]:
    """Of processes that lived through it all: what they had open at rest before and after."""
    return {pid: [before[pid].descriptors, after[pid].descriptors] for pid in before.keys() & after.keys()}
