"""SGLang engines for tests, each in its host child as a node has it; a test without SGLang installed is skipped."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from support.vllm_engine import Lab, Vllm

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ARGS = (
    "--cpu-shim", "--dtype", "float32", "--max-running-requests", "4", "--max-total-tokens", "16384",
)  # fmt: skip


def _installed() -> bool:
    try:
        return bool(version("sglang"))
    except PackageNotFoundError:
        return False


needs_sglang = pytest.mark.skipif(not _installed(), reason="SGLang is not installed: tox -e sglang")
Sglang = Vllm


def make_lab(folder: Path, model: Path, *args: str) -> Lab:
    return Lab(folder, model, "sglang", (*ARGS, *args))


def options(**more: Any) -> dict[str, Any]:
    return more
