"""Whether SGLang is installed, and whether this adapter knows its version."""

from __future__ import annotations

import logging
import re
from importlib.metadata import PackageNotFoundError, version

from p2pdyn.engines.base import EngineUsageError

log = logging.getLogger(__name__)

DISTRIBUTION = "sglang"
OLDEST, NEWEST = (0, 5, 17), (0, 5, 23)
"""Versions that were tried."""


def installed() -> str:
    """SGLang's version. Raises EngineUsageError where there is none, or one that is too old; warns of newer ones."""
    try:
        found = version(DISTRIBUTION)
    except PackageNotFoundError as error:
        raise EngineUsageError(
            "SGLang is not installed here: pip install 'p2pdyn[sglang]' on a host with GPUs; "
            "docs/design/engine-sglang.md says how to run it on one without"
        ) from error
    judge(found)
    return found


def judge(found: str) -> None:
    """Raises EngineUsageError for a version without what this adapter needs; warns of one that was never tried."""
    supported = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", found)
    release = tuple(map(int, numbers.groups())) if numbers else None
    if release is not None and release < OLDEST:
        raise EngineUsageError(f"sglang {found} is too old: versions {supported} are supported")
    if release is None or release > NEWEST:
        log.warning("sglang %s was never tried with this p2pdyn: versions %s are supported", found, supported)
