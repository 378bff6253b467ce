"""Speed of the builtin engine's forward pass with its default weights: decoding in batches, prompts, a long context.

    python bench/builtin.py [--threads N] [--repeat N]

Prints one JSON line: best and median milliseconds of each step, and, for scale, how long this core takes to read once
as many bytes as the weights have. Needs the weights in the cache (start `p2pdyn node` once).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from array import array
from collections.abc import Callable

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from p2pdyn.engines.builtin import checkpoint, weights
from p2pdyn.engines.builtin.model import Llama, Rows
from p2pdyn.engines.builtin.tiles import Threads

BLOCKS, SIZE = 1024, 16


def timed(work: Callable[[], object], repeat: int) -> dict[str, float]:
    work()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1000)
    return {"best_ms": round(min(times), 1), "median_ms": round(statistics.median(times), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    cache = weights.cache_folder()

    def silent(fraction: float, what: str) -> None:
        pass

    packed = checkpoint.load(weights.locate(None, True, cache, silent), cache, silent)
    config, tensors = packed.config, packed.tensors
    threads = Threads(options.threads)
    model = Llama(config, tensors, BLOCKS, SIZE, threads)
    ids = array("I", np.random.default_rng(0).integers(0, config.vocab, 256).tolist())
    row = list(range(BLOCKS // 2))
    scattered = np.random.default_rng(0).permutation(BLOCKS).tolist()

    def decode(count: int) -> list[Rows]:
        return [Rows(ids[:1], 100, row[8 * i : 8 * i + 8], logits=True) for i in range(count)]

    batches = {f"decode_{count}": decode(count) for count in (1, 2, 4, 8, 16, 32)}
    batches |= {f"prompt_{count}": [Rows(ids[:count], 0, row, logits=True)] for count in (64, 128, 256)}
    batches["decode_1_at_2048"] = [Rows(ids[:1], 2048, row, logits=True)]
    batches["decode_1_at_2048_scattered"] = [Rows(ids[:1], 2048, scattered, logits=True)]
    batches["prompt_128_at_2048"] = [Rows(ids[:128], 2048, row, logits=True)]
    result: dict[str, object] = {"bench": "builtin", "threads": options.threads, "cpus": os.cpu_count()}
    flat = np.zeros(sum(tensor.size for tensor in tensors.values()), np.float32)
    result["read_weights_once"] = timed(flat.sum, options.repeat)
    for name, batch in batches.items():
        result[name] = timed(lambda batch=batch: model.forward(batch), options.repeat)
    threads.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
