"""Counters of the endpoint and their Prometheus text. No client library: it would cost more memory than all of this."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

Row = tuple[str, str, str, Sequence[tuple[dict[str, str], float]]]
"""(name, type, help, [(labels, value)])."""

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Seconds in buckets; one observation costs a bisection."""

    __slots__ = ("bounds", "counts", "help", "name", "total")

    def __init__(self, name: str, help: str, bounds: tuple[float, ...]) -> None:
        self.name, self.help, self.bounds = name, help, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} histogram"
        running = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            running += count
            yield f'{self.name}_bucket{{le="{bound}"}} {running}'
        yield f"{self.name}_sum {self.total:.6f}"
        yield f"{self.name}_count {running}"


class HttpMetrics:
    """What the endpoint counts. ``requests`` is keyed by (path, status code)."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.streams = 0
        self.disconnects = 0
        self.slow_readers = 0
        self.refused_connections = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.ttft = Histogram("p2pdyn_http_ttft_seconds", "Request complete to first token.", FAST)
        self.itl = Histogram("p2pdyn_http_itl_seconds", "Between two writes of a stream, a token.", FAST)
        self.duration = Histogram("p2pdyn_http_generation_seconds", "Request complete to its last token.", LONG)

    def rows(self, connections: int) -> list[Row]:
        plain = (
            ("p2pdyn_http_connections", "gauge", "Open connections.", connections),
            ("p2pdyn_http_open_generations", "gauge", "Generations being answered.", self.streams),
            ("p2pdyn_http_disconnects_total", "counter", "Clients that left before the end.", self.disconnects),
            ("p2pdyn_http_slow_readers_total", "counter", "Connections cut because nobody read.", self.slow_readers),
            ("p2pdyn_http_refused_connections_total", "counter", "Over the cap.", self.refused_connections),
            ("p2pdyn_http_prompt_tokens_total", "counter", "Tokens of admitted prompts.", self.prompt_tokens),
            ("p2pdyn_http_output_tokens_total", "counter", "Tokens handed to clients.", self.output_tokens),
        )
        counted = [
            ({"path": path, "code": str(code)}, float(count)) for (path, code), count in sorted(self.requests.items())
        ]
        rows: list[Row] = [("p2pdyn_http_requests_total", "counter", "Answered requests.", counted)]
        return rows + [(name, kind, text, [({}, float(value))]) for name, kind, text, value in plain]

    def exposition(self, connections: int, mesh: Iterable[Row | Histogram]) -> bytes:
        """The text of /metrics: the endpoint's own and the mesh's."""
        lines: list[str] = []
        for one in (*self.rows(connections), *mesh):
            if isinstance(one, Histogram):
                lines += one.lines()
                continue
            name, kind, text, samples = one
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(labels)} {value:.10g}" for labels, value in samples]
        for histogram in (self.ttft, self.itl, self.duration):
            lines += histogram.lines()
        return ("\n".join(lines) + "\n").encode()


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
