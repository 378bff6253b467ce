"""Request traces in Mooncake's format (Qin et al., FAST '25), and synthetic ones of the same form.

JSON lines: ``timestamp`` (ms), ``input_length`` and ``output_length`` (tokens), ``hash_ids`` (one a block of 512
tokens, the last may be partial).  An id names the prefix that ends with its block; ids are chained again on
reading, so that a trace whose ids name only the block's content replays rightly as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BLOCK = 512
MAX_TOKENS = 2**31
DEFAULT_OUTPUT = 1
"""Where a trace does not say how long an answer was."""


class TraceError(ValueError):
    """The trace cannot be replayed; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Request:
    """``at`` in seconds from the trace's first request; ``blocks`` are numbers of prefixes."""

    at: float
    tokens: int
    output: int
    blocks: list[int]


def load(path: Path, block: int = BLOCK) -> list[Request]:
    """Read a trace, in order of time. Raises TraceError."""
    try:
        with path.open(encoding="utf-8") as lines:
            return build((_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()), block)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"trace {path} cannot be read: {error}") from error


def build(rows: Iterable[tuple[float, int, int, list[Any]]], block: int = BLOCK) -> list[Request]:
    """Requests from ``(timestamp in ms, input length, output length, block ids)``, in any order. Raises TraceError."""
    ordered = sorted(rows, key=lambda row: row[0])
    if not ordered:
        raise TraceError("the trace is empty: it needs one JSON object a line")
    start = ordered[0][0]
    known: dict[tuple[int, Any], int] = {}
    requests = []
    for at, tokens, output, ids in ordered:
        chained, last = [], -1
        for name in ids[: -(-tokens // block)]:
            last = known.setdefault((last, name), len(known))
            chained.append(last)
        requests.append(Request((at - start) / 1e3, tokens, output, chained))
    return requests


def spread(trace: Sequence[Request], seconds: float, rng: random.Random) -> list[Request]:
    """Each request up to ``seconds`` later: a clock with coarse ticks lets come at once what came one by one."""
    return sorted((replace(one, at=one.at + seconds * rng.random()) for one in trace), key=lambda one: one.at)


def _parse(path: Path, number: int, line: str) -> tuple[float, int, int, list[Any]]:
    where = f"line {number} of trace {path}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise TraceError(f"{where} is not a JSON object")
    at, tokens = row.get("timestamp"), row.get("input_length")
    output, ids = row.get("output_length"), row.get("hash_ids", [])
    if isinstance(at, bool) or not isinstance(at, int | float) or not abs(at) < 1e15:
        raise TraceError(f"{where} needs a timestamp in milliseconds")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 < tokens < MAX_TOKENS:
        raise TraceError(f"{where} needs an input_length of 1 to {MAX_TOKENS - 1} tokens")
    if output is None:
        output = DEFAULT_OUTPUT
    if isinstance(output, bool) or not isinstance(output, int) or not 0 <= output < MAX_TOKENS:
        raise TraceError(f"{where} has a bad output_length")
    if not isinstance(ids, list) or not all(isinstance(name, int | str) for name in ids):
        raise TraceError(f"{where} needs hash_ids, a list of numbers")
    return float(at), tokens, max(1, output), ids


# Synthetic traces: each stresses another habit of a router.


def conversations(rng: random.Random, count: int, rate: float) -> list[Request]:
    """Chats of 1 to 12 turns, each turn 100 to 3000 new tokens, under one system prompt."""
    return _sessions(rng, count, rate, shared=(1, 4), turns=(1, 12), new=(1, 6), pause=(5.0, 60.0), output=(50, 600))


def agents(rng: random.Random, count: int, rate: float) -> list[Request]:
    """Tool-using agents: a hot system prompt of 16 blocks in three versions, many short turns in quick succession."""
    return _sessions(rng, count, rate, shared=(3, 16), turns=(5, 40), new=(1, 2), pause=(0.5, 5.0), output=(20, 200))


def tools(rng: random.Random, count: int, rate: float) -> list[Request]:
    """Single prompts behind one of six system prompts of 8 to 24 blocks, the first by far the most used."""
    sizes = [8, 12, 16, 20, 24, 10]
    at, rows = 0.0, []
    for number in range(count):
        at += rng.expovariate(rate)
        which = min(int(rng.paretovariate(0.8)) - 1, len(sizes) - 1)
        ids: list[Any] = [f"s{which}.{n}" for n in range(sizes[which])]
        ids += [f"{number}.{n}" for n in range(rng.randint(1, 10))]
        rows.append((at * 1e3, len(ids) * BLOCK - rng.randrange(BLOCK), rng.randint(20, 300), ids))
    return build(rows)


def documents(rng: random.Random, count: int, rate: float) -> list[Request]:
    """Long documents of 40 to 200 blocks, of which the popular ones are asked about again and again."""
    sizes = [rng.randint(40, 200) for _ in range(max(1, count // 8))]
    at, rows = 0.0, []
    for number in range(count):
        at += rng.expovariate(rate)
        which = min(int(rng.paretovariate(0.8)) - 1, len(sizes) - 1)
        ids: list[Any] = [f"d{which}.{n}" for n in range(sizes[which])] + [f"q{number}"]
        rows.append((at * 1e3, len(ids) * BLOCK, rng.randint(50, 500), ids))
    return build(rows)


def bursts(rng: random.Random, count: int, rate: float) -> list[Request]:
    """Groups of 20 siblings within 50 ms that share a new prefix of 8 blocks (n choices, parallel tool calls)."""
    at, rows = 0.0, []
    for group in range(max(1, count // 20)):
        at += rng.expovariate(rate / 20)
        for child in range(20):
            ids: list[Any] = [f"g{group}.{n}" for n in range(8)] + [f"c{group}.{child}"]
            rows.append(((at + rng.random() * 0.05) * 1e3, 9 * BLOCK, rng.randint(20, 300), ids))
    return build(rows)


def unshared(rng: random.Random, count: int, rate: float) -> list[Request]:
    """No two prompts have anything in common; lengths vary a hundredfold."""
    at, rows = 0.0, []
    for number in range(count):
        at += rng.expovariate(rate)
        blocks = min(200, int(rng.paretovariate(1.1)) + 1)
        rows.append((at * 1e3, blocks * BLOCK, rng.randint(20, 800), [f"{number}.{n}" for n in range(blocks)]))
    return build(rows)


SYNTHETIC = {
    "conversations": conversations,
    "agents": agents,
    "tools": tools,
    "documents": documents,
    "bursts": bursts,
    "unshared": unshared,
}


def _sessions(
    rng: random.Random,
    count: int,
    rate: float,
    shared: tuple[int, int],
    turns: tuple[int, int],
    new: tuple[int, int],
    pause: tuple[float, float],
    output: tuple[int, int],
) -> list[Request]:
    """``shared`` is (how many system prompts, blocks of each); the other pairs are ranges to draw from."""
    rows: list[tuple[float, int, int, list[Any]]] = []
    begin, session = 0.0, 0
    while len(rows) < count:
        begin += rng.expovariate(rate / (sum(turns) / 2))
        session += 1
        which = rng.randrange(shared[0])
        ids: list[Any] = [f"s{which}.{n}" for n in range(shared[1])]
        at = begin
        for turn in range(rng.randint(*turns)):
            ids = ids + [f"{session}.{turn}.{n}" for n in range(rng.randint(*new))]
            rows.append((at * 1e3, len(ids) * BLOCK - rng.randrange(BLOCK), rng.randint(*output), ids))
            at += rng.uniform(*pause)
    return build(rows)
