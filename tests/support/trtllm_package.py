"""Makes a `tensorrt_llm` package whose signatures are those of one version in tests/engines/trtllm_signatures.toml."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from p2pdyn.text.card import CHATML, byte_level

TESTS = Path(__file__).parents[1]
SIGNATURES = TESTS / "engines" / "trtllm_signatures.toml"
NEWEST, MIDDLE, OLDEST = "1.3.0rc24", "1.3.0rc20", "1.2.0rc2"
VERSIONS = (OLDEST, MIDDLE, NEWEST)

MODULES = {
    "__init__.py": "from support.trtllm_double import made\n\napi = made({version!r})\n__version__ = {version!r}\n"
    "LLM, SamplingParams = api.LLM, api.SamplingParams\n",
    "llmapi/__init__.py": "from tensorrt_llm import api\n\nLLM, SamplingParams = api.LLM, api.SamplingParams\n"
    "DisaggregatedParams, TorchLlmArgs = api.DisaggregatedParams, api.TorchLlmArgs\n"
    "GuidedDecodingParams, KvCacheConfig = api.GuidedDecodingParams, api.KvCacheConfig\n",
    "llmapi/disagg_utils.py": "from tensorrt_llm import api\n\n"
    'if hasattr(api, "get_global_disagg_request_id"):\n'
    "    get_global_disagg_request_id = api.get_global_disagg_request_id\n",
    "executor/__init__.py": "",
    "executor/request.py": "from tensorrt_llm import api\n\nLoRARequest = api.LoRARequest\n",
    "executor/result.py": "from tensorrt_llm import api\n\nLogprob = api.Logprob\n",
    "executor/utils.py": "from support.trtllm_double import RequestError\n\n__all__ = ['RequestError']\n",
}


def described(version: str) -> dict[str, Any]:
    """What the file says of a version: ``entries`` by name, and how it behaves."""
    told = tomllib.loads(SIGNATURES.read_text())["versions"][version]
    below = described(told["like"]) if "like" in told else {"entries": {}}
    entries = {**below["entries"], **{one["name"]: one for one in told.get("entries", ())}}
    return {**below, **told, "entries": entries}


def make(folder: Path, version: str) -> Path:
    """Write the package and its metadata into ``folder``, for PYTHONPATH."""
    for name, text in MODULES.items():
        file = folder / "tensorrt_llm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(version=version) if name == "__init__.py" else text)
    metadata = folder / f"tensorrt_llm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: {version}\n")
    return folder


def model(folder: Path) -> Path:
    """A model folder without weights, which the double needs none of: the byte-level tokenizer, and a context."""
    folder.mkdir(parents=True, exist_ok=True)
    card = byte_level()
    config = {"model_type": "llama", "max_position_embeddings": 4096, "eos_token_id": card.eos_token_ids[-1]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": card.eos_token, "chat_template": CHATML}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_bytes(card.tokenizer_json)
    return folder


def environment(folder: Path, version: str, **knobs: Any) -> dict[str, str]:
    """What a process needs to find the double; ``knobs`` are those of :class:`support.trtllm_core.Knobs`. What breaks
    the contract is written to ``folder/violations``."""
    made = make(folder / f"trtllm-{version}", version)
    return {
        "PYTHONPATH": os.pathsep.join((str(made), str(TESTS))),
        "TRTLLM_DOUBLE": json.dumps({"report": str(folder / "violations"), **knobs}),
    }


def violations(folder: Path) -> list[str]:
    """What broke the contract so far."""
    file = folder / "violations"
    return file.read_text().splitlines() if file.exists() else []
