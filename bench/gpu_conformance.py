"""The stage `conformance` of gpu.py: tests/engines/conformance on one engine, and what its lines of output say."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_side import PROGRESS_S, Server, Servers, say
from gpu_stages import Plan

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "tests" / "engines" / "conformance"
OUTCOME = re.compile(r"^\S+::(\S+) (PASSED|FAILED|SKIPPED|ERROR)\b", re.MULTILINE)
REASON = re.compile(r"^(?:FAILED|ERROR) \S+::(\S+) - (.+)", re.MULTILINE)
SKIPPED = re.compile(r"^SKIPPED \[\d+\] \S+ (.+)", re.MULTILINE)
SHARE_S = 20.0
"""Of the stage's limit, for its end: a suite that is cut is told of as far as it came."""


def conformance(plan: Plan, servers: Servers) -> dict[str, Any]:
    """Run the suite on GPU 0. It starts an engine of its own four times: alone, a pair for prefill and decode on the
    same GPU, and once more after it was killed."""
    # No plugin but the timeouts': others that lie about could fail a run by their own warnings.
    command = [sys.executable, "-m", "pytest", str(SUITE), "--engine", plan.subject, "-v", "--color=no"]
    command += ["-c", str(ROOT / "setup.cfg"), "--rootdir", str(ROOT), "-p", "pytest_timeout", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings=default", "-o", "console_output_style=classic"]
    path = {"PYTHONPATH": ":".join(filter(None, (str(Path(__file__).parent), servers.env.get("PYTHONPATH", ""))))}
    env = plan.gpu(0) | path | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    suite = servers.program("conformance", command, env)
    code = _wait(suite, plan.limit_s - SHARE_S)
    line = _told(suite.text())
    line |= {"gpus": plan.gpus, "subject": plan.subject, "exit": code}
    if code != 0:
        line["error"] = "cut by the stage's limit" if code is None else f"pytest ended with {code}: {suite.complaint()}"
    return line


def _wait(suite: Server, limit_s: float) -> int | None:
    """Its exit code; None when it takes longer."""
    deadline, told = time.monotonic() + limit_s, time.monotonic()
    while (code := suite.process.poll()) is None:
        now = time.monotonic()
        if now > deadline:
            return None
        if now - told > PROGRESS_S:
            told = now
            say(f"conformance, {now - suite.started:.0f} s: {suite.last_line()}")
        time.sleep(0.2)
    return code


def _told(text: str) -> dict[str, Any]:
    """Counts, failures and the reasons of skips in pytest's output."""
    outcomes = {name: outcome.lower() for name, outcome in OUTCOME.findall(text)}
    counts = Counter(outcomes.values())
    reasons = dict(REASON.findall(text))
    failed = [name for name, outcome in outcomes.items() if outcome in ("failed", "error")]
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "error", "skipped") if counts[outcome]},
        "failures": {name: reasons.get(name, "")[:300] for name in failed},
        "why_skipped": sorted(set(SKIPPED.findall(text))),
    }
