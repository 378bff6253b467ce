"""Which TensorRT-LLM is installed, whether this adapter knows its API, and what its sampler honours."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from p2pdyn.engines.base import EngineUsageError

log = logging.getLogger(__name__)

OLDEST, NEWEST = (1, 2), (1, 3)
"""Minor versions whose sources were read."""
FINAL = 10**6
"""Stands for the release candidate of a version that is none."""
PENALTIES = (1, 3, 0, 24)
"""From here on TensorRT-LLM's documentation lists min-p and penalties for its default sampler; older ones take them
and ignore them (its pull requests 16485 and 16590)."""
SEEDS = (1, 4, 0, 0)
"""The default sampler knows a seed for each request (its pull request 17172); older ones have one for all."""

_FORM = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:rc(\d+))?")


def installed() -> str:
    """The version of TensorRT-LLM. Raises EngineUsageError where there is none, or one that is too old; warns of newer
    ones."""
    try:
        found = version("tensorrt-llm")
    except PackageNotFoundError as error:
        raise EngineUsageError(
            "TensorRT-LLM is not installed here: pip install 'p2pdyn[trtllm]' on a Linux host with NVIDIA GPUs, or run "
            "p2pdyn in NVIDIA's container"
        ) from error
    judge(found)
    return found


def judge(found: str) -> None:
    """Raises EngineUsageError for a version without what this adapter needs; warns of one whose API was not read."""
    written_to = f"this adapter is written to the API of {OLDEST[0]}.{OLDEST[1]} and {NEWEST[0]}.{NEWEST[1]}"
    minor = order(found)[:2]
    if minor < OLDEST:
        raise EngineUsageError(f"TensorRT-LLM {found} is too old: {written_to}")
    if minor > NEWEST:
        log.warning("TensorRT-LLM %s is newer than any that was read: %s", found, written_to)
    log.warning("%s, and was not run on hardware by its authors", written_to)


def order(found: str) -> tuple[int, int, int, int]:
    """(major, minor, patch, release candidate), to compare by; all 0 for what is no version."""
    form = _FORM.match(found)
    if form is None:
        return 0, 0, 0, 0
    major, minor, patch, candidate = form.groups()
    return int(major), int(minor), int(patch or 0), FINAL if candidate is None else int(candidate)


def honoured(found: str, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Features beyond plain sampling that depend on the sampler: what it would ignore is not among them."""
    if "TRTLLMSampler" in str(arguments.get("sampler_type")):  # the C++ one, up to 1.3.0rc25
        return "min_p", "penalties", "seed"
    since = order(found)
    return ("min_p", "penalties") * (since >= PENALTIES) + ("seed",) * (since >= SEEDS)


def parameters(of: Callable[..., Any]) -> frozenset[str] | None:
    """The names that a callable takes; None if it takes any, or does not say."""
    try:
        found = inspect.signature(of).parameters
    except (TypeError, ValueError):
        return None
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in found.values()):
        return None
    return frozenset(found)


def takes(of: Callable[..., Any], name: str) -> bool:
    """Whether a callable has this parameter, or may have."""
    known = parameters(of)
    return known is None or name in known
