"""What the stages of gpu.py must know of an engine: its own server, its flags, its environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_model import Shape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
COMMON = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CPU = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Need:
    """What one server of a stage is to hold. ``streams``: sequences at a time; ``share``: of a GPU's memory, below 1
    for all that share it; ``dummy``: the weights are not read from the folder; ``eager``: no CUDA graphs."""

    shape: Shape
    streams: int
    kv_gib: int
    share: float
    dtype: str
    dummy: bool
    eager: bool

    @property
    def kv_tokens(self) -> int:
        """How many tokens ``kv_gib`` holds."""
        shape = self.shape
        token = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * BYTES[self.dtype]
        return self.kv_gib * 2**30 // token


@dataclass(frozen=True)
class Engine:
    """``block`` is in tokens. ``flags``, for a Need, go to the engine's own server and behind a node's ``--`` alike;
    ``only_worker`` to the node alone, ``serve`` (model, port) begins the server's command, which is up once ``health``
    answers 200. ``exact_dtype`` is the default of the model whose tokens are compared. ``counters``: its worker logs
    how much of the prompts the engine found in its own cache, and had from other workers. ``subject`` names what the
    conformance suite is to test."""

    name: str
    packages: tuple[str, ...]
    block: int
    env: dict[str, str]
    health: str
    serve: Callable[[Path, int], list[str]]
    flags: Callable[[Need], list[str]]
    only_worker: tuple[str, ...]
    exact_dtype: str
    counters: bool
    subject: str


# ---- vLLM


def vllm(cpu: bool) -> Engine:
    env = COMMON | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_COLOR": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if cpu:
        env |= CPU | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    else:  # Triton's float32 products are float32's, not TF32's
        env |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "TRITON_F32_DEFAULT": "ieee"}
    block = 32 if cpu else 16

    def flags(need: Need) -> list[str]:
        """With a size for its KV memory vLLM does not measure what is free, so several can start at once on a GPU."""
        made = ["--max-num-seqs", str(need.streams), "--max-model-len", str(need.shape.context)]
        made += ["--block-size", str(block), "--dtype", need.dtype]
        made += ["--load-format", "dummy"] if need.dummy else []
        if cpu:
            return [*made, "--enforce-eager"]
        made += ["--gpu-memory-utilization", str(need.share), "--kv-cache-memory-bytes", str(need.kv_gib * 2**30)]
        if need.eager:
            return [*made, "--enforce-eager"]
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": _batches(need.streams)}
        return [*made, "--compilation-config", json.dumps(graphs)]

    return Engine(
        name="vllm",
        packages=("vllm", "vllm-cpu"),
        block=block,
        env=env,
        health="/v1/models",
        serve=_serve_vllm,
        flags=flags,
        only_worker=(),
        exact_dtype="float32",
        counters=True,
        subject="vllm" if cpu else "gpu_subjects:VLLM",
    )


def _serve_vllm(model: Path, port: int) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    return [*command, *_at(port), "--uvicorn-log-level", "warning"]


# ---- SGLang

SHIMMED = (
    "import runpy; from p2pdyn.engines.sglang import cpu_shim; cpu_shim.install(); "
    "runpy.run_module('sglang.launch_server', run_name='__main__')"
)
"""SGLang's own server on a host without a GPU: see p2pdyn.engines.sglang.cpu_shim."""
FREE = 0.88
"""Of what is free when a server starts. Each has its number of tokens given; this must only not be in the way of it."""


def sglang(cpu: bool) -> Engine:
    def flags(need: Need) -> list[str]:
        """Its fastest attention kernels on Hopper (fa3) are a gigabyte of wheel; Triton's are there on every GPU."""
        made = ["--dtype", need.dtype, "--page-size", "16", "--context-length", str(need.shape.context)]
        made += ["--max-running-requests", str(need.streams)]
        made += ["--load-format", "dummy"] if need.dummy else []
        made += ["--enable-fp32-lm-head"] if need.dtype == "float16" else []  # else the best logits are often equal
        if cpu:
            made += ["--max-total-tokens", str(4 * need.shape.context), "--mem-fraction-static", "0.1"]
            made += ["--device", "cpu", "--attention-backend", "torch_native"]
            return [*made, "--disable-cuda-graph", "--disable-overlap-schedule", "--sleep-on-idle"]
        made += ["--max-total-tokens", str(need.kv_tokens), "--mem-fraction-static", str(FREE)]
        made += ["--attention-backend", "triton", "--sampling-backend", "pytorch"]
        if need.eager:
            return [*made, "--disable-cuda-graph"]
        made += ["--cuda-graph-backend-prefill", "disabled"]
        return [*made, "--cuda-graph-bs-decode", *map(str, _batches(need.streams))]

    def serve(model: Path, port: int) -> list[str]:
        command = [sys.executable, *(("-c", SHIMMED) if cpu else ("-m", "sglang.launch_server"))]
        return [*command, "--model-path", str(model), *_at(port), "--log-level-http", "warning"]

    return Engine(
        name="sglang",
        packages=("sglang", "sglang-kernel", "flashinfer-python"),
        block=16,
        env=COMMON | CPU if cpu else COMMON,
        health="/health",
        serve=serve,
        flags=flags,
        only_worker=("--cpu-shim",) if cpu else (),
        exact_dtype="float32" if cpu else "float16",
        counters=False,
        subject="sglang" if cpu else "gpu_subjects:SGLANG",
    )


def _at(port: int) -> Sequence[str]:
    return "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)


def _batches(most: int) -> list[int]:
    """Batch sizes that CUDA graphs are made for."""
    return [size for size in (1, 2, 4, *range(8, most + 1, 8)) if size <= most]


ENGINES = {"vllm": vllm, "sglang": sglang}
"""Each takes whether it is to run on a CPU."""
