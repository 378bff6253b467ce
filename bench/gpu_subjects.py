"""The conformance suite's subjects on a GPU; `pytest tests/engines/conformance --engine gpu_subjects:NAME` with this
folder in PYTHONPATH. Models and what an engine cannot are those of the suite's own subjects."""

from __future__ import annotations

from dataclasses import replace

from engines.conformance import subjects

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SIZES_VLLM = ("--max-num-seqs=4", "--max-model-len=1024", "--block-size=16", "--num-gpu-blocks-override=128")
SIZES_SGLANG = ("--max-running-requests=4", "--context-length=1024", "--max-total-tokens=4096")
TIE = 0.02
"""Of logits near 3 whose float16 activations were rounded in another order."""

VLLM = replace(
    subjects.VLLM,
    # three engines share the GPU; a size for the KV memory, or vLLM would measure what the others leave
    args=(
        *SIZES_VLLM,
        "--enforce-eager",
        "--dtype=float32",
        "--gpu-memory-utilization=0.2",
        f"--kv-cache-memory-bytes={2**28}",
    ),
    environment={
        **ENVIRONMENT,
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "TRITON_F32_DEFAULT": "ieee",
    },
)
"""In float32, with Triton's attention: FlashAttention has 16 bits only."""

_ARGS = (
    *SIZES_SGLANG,
    "--dtype=float16",
    "--enable-fp32-lm-head",
    "--attention-backend=triton",
    "--disable-cuda-graph",
    "--mem-fraction-static=0.8",
)
_NO_SALT = {"cache_salt": "SGLang 0.5.17 takes none"}
_NO_SEEDS = "it goes by seeds only with --enable-deterministic-inference: gpu_subjects:SGLANG_DETERMINISTIC"

SGLANG = replace(
    subjects.SGLANG,
    args=(*_ARGS, "--sampling-backend=pytorch"),
    environment=ENVIRONMENT,
    cannot={"seed": _NO_SEEDS, "resumed seed": _NO_SEEDS, **_NO_SALT},
    tie=TIE,
)
"""Its kernels have no float32; of 16 bits float16 has the finer steps, and logits of float32 are hardly ever equal."""

SGLANG_DETERMINISTIC = replace(SGLANG, args=(*_ARGS, "--enable-deterministic-inference"), cannot=_NO_SALT, tie=TIE)
"""With seeds, and kernels whose results do not depend on the batch."""
