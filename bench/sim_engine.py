"""The simulated engine alone, without waiting: what a worker's tokens cost before any socket; one JSON line a batch."""

from __future__ import annotations

import argparse
import json
import random
import time
from array import array

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import EngineOptions, Sequence
from p2pdyn.engines.sim import create

PROMPT = 430
OUTPUT = 32


def measure(batch: int, seconds: float) -> dict[str, float]:
    """Sequences of unlike prompts, `batch` at a time, replaced as they end."""
    engine = create(EngineOptions(args=("--speedup", "0")))
    engine.load(lambda fraction, what: None)
    rng = random.Random(3)
    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    key = tokens = steps = done = 0

    def submit() -> None:
        nonlocal key
        prompt = array("I", [rng.randrange(97, 123)]) * 8 + array(
            "I", range(1000 + key % 997, 1000 + key % 997 + PROMPT - 8)
        )
        engine.submit(Sequence(key, prompt, len(prompt), params), 0.0)
        key += 1

    for _ in range(batch):
        submit()
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        outputs = engine.step(0.0).outputs
        steps += 1
        for output in outputs:
            tokens += len(output.tokens)
            if output.finish:
                done += 1
                submit()
    engine.close()
    return {"tok_s": round(tokens / spent), "req_s": round(done / spent), "step_us": round(spent / steps * 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of a second each: proves that it runs")
    seconds = 0.1 if parser.parse_args().quick else 2.0
    for batch in (1, 16, 64):
        print(
            json.dumps({"bench": "sim-engine", "batch": batch, "prompt": PROMPT, **measure(batch, seconds)}), flush=True
        )


if __name__ == "__main__":
    main()
