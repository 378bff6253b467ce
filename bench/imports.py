"""Resident memory and time of each import, alone and in the order in which a worker and a frontend need them.

One JSON line a module: kB of RSS, PSS and private memory above a bare interpreter (alone) or above the module before
(worker, frontend).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

ALONE = [
    *("asyncio", "zmq", "msgpack", "uvloop", "xxhash", "orjson", "httptools", "click", "jinja2.sandbox", "tokenizers"),
    *("zeroconf.asyncio", "numpy", "gguf", "starlette.applications", "uvicorn.protocols.http.httptools_impl"),
    *("ssl", "dataclasses", "importlib.metadata"),
]
WORKER = ["dataclasses", "asyncio", "zmq", "msgpack", "uvloop", "xxhash", "click", "p2pdyn.cli.main"]
FRONTEND = [
    *WORKER,
    *("orjson", "httptools", "jinja2.sandbox", "tokenizers", "zeroconf.asyncio"),
    *("starlette.applications", "uvicorn.protocols.http.httptools_impl"),
]

PROBE = r"""
import sys, time
def memory():
    fields = dict.fromkeys(("Rss:", "Pss:", "Private_Dirty:"), 0)
    for line in open("/proc/self/smaps_rollup"):
        words = line.split()
        if words[0] in fields:
            fields[words[0]] = int(words[1])
    return list(fields.values())
before = memory()
for name in sys.argv[1:]:
    start = time.perf_counter()
    __import__(name)
    spent = time.perf_counter() - start
    after = memory()
    print(*(b - a for a, b in zip(before, after)), *after, round(spent * 1e3, 1))
    before = after
"""


def probe(modules: list[str], runs: int) -> list[list[float]]:
    """For each module: added and total (rss, pss, private) in kB, and ms; medians over `runs` fresh interpreters."""
    tables = []
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *modules], capture_output=True, text=True, check=True, timeout=60
        )
        tables.append([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
    return [[statistics.median(column) for column in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def emit(kind: str, module: str, row: list[float]) -> None:
    names = ("rss_kb", "pss_kb", "private_kb", "total_rss_kb", "total_pss_kb", "total_private_kb", "ms")
    print(json.dumps({"bench": "imports", "kind": kind, "module": module, **dict(zip(names, row, strict=True))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    for module in ALONE:
        emit("alone", module, probe([module], runs)[0])
    for kind, chain in (("worker", WORKER), ("frontend", FRONTEND)):
        for module, row in zip(chain, probe(chain, runs), strict=True):
            emit(kind, module, row)


if __name__ == "__main__":
    main()
