"""What tensorrt_llm.LLM is made with: its own arguments, from after ``--``, and ours where the user gives none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2pdyn.engines.base import EngineOptions, EngineUsageError
from p2pdyn.engines.hosted import adapters

EVENT_BUFFER = 100_000
"""KV events that TensorRT-LLM keeps between two looks; by default none. Dynamo takes as many."""
TRANSFER_TIMEOUT_MS = 60_000
"""How long a prefill's blocks wait for the decode worker that is to have them."""
ROLES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Arguments:
    """``llm`` are the keyword arguments of the LLM. ``loras`` are adapters' folders by name."""

    llm: dict[str, Any]
    loras: dict[str, str]

    def get(self, dotted: str, default: Any = None) -> Any:
        """``a.b`` of the keyword arguments."""
        value = found(self.llm, dotted)
        return default if value is None else value


def found(settings: Any, dotted: str) -> Any:
    """``a.b`` of maps and objects within each other; None where it is not there."""
    for name in dotted.split("."):
        settings = settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
    return settings


def environment(options: EngineOptions) -> None:
    """What TensorRT-LLM and its libraries read from the environment. Call it before it is imported."""
    environ = os.environ
    environ.setdefault("TRTLLM_NO_USAGE_STATS", "1")
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.offline:
        environ["HF_HUB_OFFLINE"] = environ["TRANSFORMERS_OFFLINE"] = "1"


def parse(options: EngineOptions, fields: frozenset[str] | None) -> Arguments:
    """Read ``options.args``: ``--name value``, ``--name=value`` or ``name=value``; dots go into a configuration
    (``--kv-cache-config.max-tokens 8192``); values are JSON, else text. ``fields`` are the names that TensorRT-LLM
    takes, None if unknown. Raises EngineUsageError."""
    if not options.model:
        raise EngineUsageError("the trtllm engine needs --model: a folder in Hugging Face's layout, or a name there")
    given, loras = _read(options.args)
    if fields is not None and (unknown := sorted(given.keys() - fields)):
        raise EngineUsageError(f"TensorRT-LLM has no argument {', '.join(unknown)}: see its LLM API reference, LlmArgs")
    defaults = {"model": options.model, **_defaults(options, given, bool(loras))}
    if fields is not None:
        defaults = {name: value for name, value in defaults.items() if name in fields or name == "model"}
    return Arguments(_merged(defaults, given), loras)


def _defaults(options: EngineOptions, given: Mapping[str, Any], loras: bool) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "backend": "pytorch",
        "skip_tokenizer_init": not given.get("guided_decoding_backend"),  # which needs the tokenizer
        "enable_iter_perf_stats": True,  # the load report
        "kv_cache_config": {"enable_block_reuse": True, "event_buffer_max_size": EVENT_BUFFER},
    }
    if loras:
        defaults["enable_lora"] = True
    if options.role in ROLES:
        defaults["cache_transceiver_config"] = {"backend": "DEFAULT", "kv_transfer_timeout_ms": TRANSFER_TIMEOUT_MS}
    if options.role == "prefill":
        defaults["disable_overlap_scheduler"] = True  # TensorRT-LLM's examples: context servers do not support it
    return defaults


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` wins; where both are maps, name by name."""
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _read(args: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    given: dict[str, Any] = {}
    loras: dict[str, str] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not name or not (equals or flag.startswith("--")):
            raise EngineUsageError(f"TensorRT-LLM's arguments are --name value or name=value, not {word!r}")
        if name == "lora_modules":
            modules = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                modules.append(rest.pop(0))
            loras.update(adapters(modules))
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        _put(given, name.split("."), _value(value))
    return given, loras


def _put(into: dict[str, Any], path: list[str], value: Any) -> None:
    *folders, name = path
    for folder in folders:
        inner = into.setdefault(folder, {})
        if not isinstance(inner, dict):
            raise EngineUsageError(f"argument {'.'.join(path)} is in {folder}, which is given as {inner!r}")
        into = inner
    into[name] = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
