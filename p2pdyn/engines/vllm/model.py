"""What frontends and routers must know of the model that vLLM serves."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2pdyn.engines.base import EngineError
from p2pdyn.text.card import CardError, ModelCard, from_folder

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def folder_of(model: str, revision: str | None) -> Path:
    """The folder of a model that is named by its folder or by its name at Hugging Face; in the latter case what vLLM
    has not downloaded is. Raises EngineError."""
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=SMALL_FILES))
    except Exception as error:  # of many unrelated classes
        raise EngineError(
            f"model {model!r} is no folder here and cannot be had from Hugging Face ({type(error).__name__}): name a "
            "folder with --model"
        ) from error


def card_of(folder: Path, context: int, features: tuple[str, ...]) -> ModelCard:
    """The folder's card with vLLM's context. Raises EngineError."""
    try:
        return replace(from_folder(folder, features), context=context)
    except CardError as error:
        raise EngineError(str(error)) from error


def weights_of(folder: Path, config: Any) -> str:
    """A digest of config.json, of the weight files' names and sizes, and of how vLLM computes with them: alike on any
    two hosts with the same files, without reading gigabytes. Weights retrained to the same sizes look the same: give
    such a model another name."""
    digest = hashlib.blake2b(digest_size=16)
    described = folder / "config.json"
    if described.is_file():
        digest.update(described.read_bytes())
    for file in sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        digest.update(f"\n{file.name} {file.stat().st_size}".encode())
    model, cache = config.model_config, config.cache_config
    ways = (model.dtype, model.quantization, cache.cache_dtype, config.load_config.load_format == "dummy")
    digest.update(repr(ways).encode())
    return digest.hexdigest()
