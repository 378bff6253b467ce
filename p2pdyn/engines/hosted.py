"""What adapters of other people's engines have in common: the model's folder, budgets, outputs, words for errors."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

from p2pdyn.engines.base import EngineError, EngineUsageError, Output, Sequence
from p2pdyn.text.card import CardError, ModelCard, from_folder

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


# ---- the model


def folder_of(model: str, revision: str | None) -> Path:
    """The folder of a model that is named by its folder or by its name at Hugging Face; in the latter case what the
    engine has not downloaded is. Raises EngineError."""
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
    """The folder's card with the engine's context (0: the folder's own). Raises EngineError."""
    try:
        card = from_folder(folder, features)
    except CardError as error:
        raise EngineError(str(error)) from error
    return replace(card, context=context) if context else card


def weights_of(folder: Path, dtype: object, quantization: object, kv_dtype: object, dummy: bool) -> str:
    """A digest of config.json, of the weight files' names and sizes, and of how the engine computes with them: alike on
    any two hosts with the same files, without reading gigabytes, and in any two engines. Weights retrained to the same
    sizes look the same: give such a model another name.

    dtype: torch's, or its name. kv_dtype: "auto" is dtype. dummy: the files are not read.
    """
    digest = hashlib.blake2b(digest_size=16)
    described = folder / "config.json"
    if described.is_file():
        digest.update(described.read_bytes())
    for file in sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        digest.update(f"\n{file.name} {file.stat().st_size}".encode())
    computed = _dtype_name(dtype)
    kept = computed if kv_dtype == "auto" else _dtype_name(kv_dtype)
    digest.update(f"\n{computed} {quantization or ''} {kept} {dummy}".encode())
    return digest.hexdigest()


def _dtype_name(dtype: object) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"fp8": "fp8_e4m3", "half": "float16", "float": "float32"}.get(name, name)


def adapters(modules: Iterable[str]) -> dict[str, str]:
    """LoRA adapters' folders by name, from ``--lora-modules NAME=FOLDER...``. Raises EngineUsageError."""
    loras = {}
    for module in modules:
        name, equals, path = module.partition("=")
        if not (name and equals and path):
            raise EngineUsageError(f"--lora-modules takes NAME=FOLDER, not {module!r}")
        loras[name] = path
    return loras


# ---- sequences and outputs


class Unreadable(ValueError):
    """What another worker said of its KV is nothing this one understands: the request is not at fault."""


def budget(sequence: Sequence, context: int) -> tuple[int, str, str]:
    """(how many tokens it may still produce, finish, detail); the first is 0 when it has ended before it began.
    ``context`` is the model card's, which all workers that are routed together share: a prompt beyond it is "invalid"
    here as anywhere. What one worker's KV cache or batch is too small for is the engine's own to refuse."""
    length, wanted = len(sequence.tokens), sequence.params.max_tokens
    if not length:
        return 0, "invalid", "the prompt is empty"
    if sequence.hand_over:
        return (1, "", "") if length < context else (0, "invalid", _too_long(length, context))
    if sequence.prompt_len >= context:
        return 0, "invalid", _too_long(sequence.prompt_len, context)
    room = min(sequence.prompt_len + wanted, context) - length
    return (room, "", "") if room > 0 else (0, "length", "")


def _too_long(length: int, context: int) -> str:
    return f"the prompt has {length} tokens, but the context is {context}: shorten it"


def joined(earlier: Output | None, later: Output) -> Output:
    """Two outputs of one sequence, told in one step."""
    if earlier is None:
        return later
    return Output(
        later.key,
        earlier.tokens + later.tokens,
        later.finish,
        earlier.cached + later.cached,
        earlier.logprobs + later.logprobs,
        later.detail,
    )


# ---- time


def boot_time() -> float:
    """Seconds, those included in which the host was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# ---- words


def one_line(error: BaseException) -> str:
    """The first line that says something of an exception: pydantic's and the engines' go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:  # pydantic: a count, the place, what is wrong, its input
        lines = [line for line in lines[1:] if "error," in line] or lines[1:]
    line = lines[0] if lines else type(error).__name__
    line = line.partition(" [type=")[0].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return shorten(line, 300, placeholder=" ...")


def log_to_stderr(engine: str) -> None:
    """An adapter's own log, in the engine's child: engines set up their own loggers only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(levelname)s {engine}: %(message)s"))
    own = logging.getLogger("p2pdyn")
    own.addHandler(handler)
    own.setLevel(logging.INFO)
