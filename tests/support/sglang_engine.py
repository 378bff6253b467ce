"""SGLang engines for tests, each in its host child as a node has it; a test without SGLang installed is skipped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.vllm_engine import START_S, Vllm, installed

Sglang = Vllm
"""The driven engine is the same; only what it drives is not."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # Short, so that what is left open by a fault is seen to end.
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "8",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "20",
    "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "5",
}
ARGS = ("--cpu-shim", "--dtype", "float32", "--max-running-requests", "4", "--max-total-tokens", "16384")

needs_sglang = pytest.mark.skipif(not installed("sglang"), reason="SGLang is not installed: tox -e sglang")


def prompt(length: int) -> list[int]:
    """Random bytes, the same each time."""
    rng = random.Random(length)
    return [rng.randrange(256) for _ in range(length)]


@dataclass(frozen=True)
class Alone:
    """What SGLang answers without p2pdyn: greedy token ids, and at each the gap between the two best logprobs."""

    tokens: list[int]
    gaps: list[float]


class Asked:
    """An sglang.Engine of its own that is asked prompt by prompt, and ends."""

    def __init__(self, folder: Path, model: Path, prompts: Iterable[list[int]], new_tokens: int) -> None:
        asked = folder / "asked.json"
        asked.write_text(json.dumps({"model": str(model), "prompts": list(prompts), "new_tokens": new_tokens}))
        self._told, self._log = folder / "told.json", folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.sglang_engine", str(asked), str(self._told)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])},
                process_group=0,
            )

    def answers(self) -> list[Alone]:
        """Wait for them."""
        code = self._process.wait(START_S)
        assert code == 0, self._log.read_text()[-4000:]
        return [Alone(*one) for one in json.loads(self._told.read_text())]

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)


def _main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    from p2pdyn.engines.sglang import cpu_shim

    cpu_shim.install()
    import sglang

    engine = sglang.Engine(
        model_path=asked["model"], device="cpu", attention_backend="torch_native", dtype="float32", page_size=16,
        mem_fraction_static=0.1, max_total_tokens=16384, max_running_requests=4, disable_cuda_graph=True,
        disable_overlap_schedule=True, disable_radix_cache=True, skip_tokenizer_init=True,
    )  # fmt: skip
    told = []
    for prompt in asked["prompts"]:
        params = {"temperature": 0.0, "max_new_tokens": asked["new_tokens"], "ignore_eos": True}
        answer = engine.generate(input_ids=prompt, sampling_params=params, return_logprob=True, top_logprobs_num=2)
        rows = answer["meta_info"]["output_top_logprobs"]
        told.append((answer["output_ids"], [best[0] - second[0] for best, second in rows]))
    Path(sys.argv[2]).write_text(json.dumps(told))
    engine.shutdown()


if __name__ == "__main__":
    _main()
