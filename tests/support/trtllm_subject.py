"""The double of TensorRT-LLM as a subject of the conformance suite:
``pytest tests/engines/conformance --engine support.trtllm_subject:NEWEST``.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from engines.conformance.subjects import Subject

from support import trtllm_package

_FOLDER = Path(tempfile.mkdtemp(prefix="p2pdyn-trtllm-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


ARGS = (
    "--max-batch-size=4",
    "--max-seq-len=1024",
    "--max-num-tokens=2048",
    "--kv-cache-config.max-tokens=4096",
    "--kv-cache-config.tokens-per-block=16",
)


def _subject(name: str, version: str, **cannot: str) -> Subject:
    return Subject(
        name,
        "trtllm",
        ARGS,
        lambda folder: str(trtllm_package.model(folder / "bytes")),
        trtllm_package.environment(_FOLDER, version),
        {"eos": "the double's tokens are printable, never an end token", **cannot},
        apart=True,
    )


NEWEST = _subject("trtllm-double", trtllm_package.NEWEST, seed="no version that was read honours one for each request")
OLDEST = _subject(
    "trtllm-double-1.2", trtllm_package.OLDEST, seed="as in later versions", cache_salt="its events tell none"
)
