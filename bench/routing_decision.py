"""What one routing decision costs, all of it: hash the prompt, match it, choose a target, write down that it was sent
there, and let it go again; against a naive dict with int bit sets, which hashes and walks and chooses nothing.

A decision each 10 ms.  The targets are idle, one holds the whole prompt, the others a system prompt and a little more.
JSON lines; ``ratio`` is our time over the naive one's; ``beyond_us`` is what is ours beyond hashing and matching.
Sides alternate; medians.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from array import array
from itertools import count

from kv_index import BLOCK, SHARED, Side, alternate, naive_hashes, naive_match

from p2pdyn.core.kvhash import sequence_hashes
from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.request import Job
from p2pdyn.core.router import Router
from p2pdyn.core.router_cost import MIN_HIT_TOKENS
from p2pdyn.core.routes import Endpoint, Routes, Serving
from p2pdyn.core.types import Load, NodeId, SamplingParams

MODEL = "m"
LENGTHS = (48, 432, 1024, 8192, 32_768, 100_000)


def measure(length: int, targets: int, background: int, rounds: int, rng: random.Random) -> None:
    tokens = array("I", [rng.randrange(150_000) for _ in range(length)])
    hashes = sequence_hashes(tokens.tobytes(), BLOCK)
    index = KvIndex()
    held: dict[int, int] = {}
    routes = Routes(Router("kv", random.Random(1), index))
    names = [NodeId(f"{number:016x}") for number in range(targets)]
    for number, name in enumerate(names):
        slot = index.add()
        depth = len(hashes) if number == targets // 2 else min(len(hashes) - 1, SHARED + 4 * number)
        own = hashes[:depth] + [rng.getrandbits(64) for _ in range(background // targets)]
        index.store(slot, 0, array("Q", own))
        for one in own:
            held[one] = held.get(one, 0) | 1 << slot
        routes.placed((name, 0), slot)
    routes.update({MODEL: Serving(BLOCK, tuple(Endpoint(name, 0, True) for name in names))})
    for name in names:
        routes.report(name, 0, Load(prefill_tps=5000.0), 0.0)
    job = Job(MODEL, tokens, SamplingParams())
    among = (1 << targets) - 1
    clock = count(1)

    def routed() -> float:
        now = next(clock) * 0.01
        start = time.perf_counter()
        decision = routes.choose(job, tokens, None, now)
        assert decision is not None
        routes.router.sent(1, decision, now)
        spent = time.perf_counter() - start
        if decision.view.known != len(hashes):
            raise SystemExit("decision: the whole prompt was not found")
        routes.router.first_token(1, now)
        routes.router.finished(1, now, 1)
        return spent

    def naive() -> float:
        start = time.perf_counter()
        naive_match(held, naive_hashes(job.tokens.tobytes()), among)
        return time.perf_counter() - start

    def matched() -> float:
        start = time.perf_counter()
        index.match(sequence_hashes(tokens.tobytes(), BLOCK), among)
        return time.perf_counter() - start

    first = routes.explain(job, 0.0)  # later ones may go to another: who has just worked for so many gets fewer
    if first is None or (len(hashes) * BLOCK >= MIN_HIT_TOKENS and first.target.worker != names[targets // 2]):
        raise SystemExit("decision: not the worker that holds the prompt")
    sides: tuple[Side, Side] = (routed, naive)
    ours, theirs = alternate(*sides, rounds)
    whole, part = alternate(routed, matched, rounds)
    line = {
        "bench": "routing-decision",
        "tokens": length,
        "targets": targets,
        "us": round(ours * 1e6, 1),
        "naive_us": round(theirs * 1e6, 1),
        "ratio": round(ours / theirs, 2),
        "beyond_us": round((whole - part) * 1e6, 1),
        "us_a_block": round(ours * 1e6 / len(hashes), 3),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little of each: proves that it runs")
    quick = parser.parse_args().quick
    rng = random.Random(0)
    for targets in (2, 32):
        for length in LENGTHS:
            measure(length, targets, 10_000 if quick else 500_000, 10 if quick else 150, rng)


if __name__ == "__main__":
    main()
