"""`p2pdyn doctor`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pdyn.cli.errors import FAILED, USAGE, Failure
from p2pdyn.constants import DEFAULT_PORT
from p2pdyn.core.types import Address

if TYPE_CHECKING:
    from p2pdyn.doctor import Plan
    from p2pdyn.doctor_host import Finding

MARKS = {"ok": ("ok  ", "\x1b[32m"), "warn": ("warn", "\x1b[33m"), "fail": ("FAIL", "\x1b[31m")}
RESET = "\x1b[0m"


@click.command(
    "doctor",
    epilog="\b\nExamples:\n"
    "  p2pdyn doctor                                      before the first start\n"
    "  p2pdyn doctor --config worker.toml                 with the settings of a node\n"
    "  p2pdyn doctor --cluster-key FILE --at HOST:7400    why does this host not join?\n",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--config", metavar="FILE", help="A node's TOML file, to check the settings in it.")
@click.option("--listen", metavar="ADDRESS", help="Address or interface for peers.  [the best interface]")
@click.option("--port", metavar="BASE", help="First of four ports for peers.  [7400]")
@click.option("--http", metavar="HOST:PORT", help="Where the OpenAI endpoint would listen.  [127.0.0.1:8000]")
@click.option("--cluster-key", metavar="FILE", envvar="P2PDYN_CLUSTER_KEY", help="The cluster's key file.")
@click.option("--seed", metavar="HOST:PORT", multiple=True, help="A seed to try; may be repeated.")
@click.option("--seeds-file", metavar="FILE", help="A file of seeds to try.")
@click.option("--offline", is_flag=True, default=None, help="Nothing can be downloaded here.")
@click.option("--at", metavar="HOST:PORT", envvar="P2PDYN_AT", help=f"A running peer.  [127.0.0.1:{DEFAULT_PORT}]")
def command(as_json: bool, at: str | None, **flags: Any) -> int:
    """Check this host, and the cluster at --at where one runs: each finding says what to do about it.

    Exit code 1 when something fails; warnings alone leave it 0.
    """
    from p2pdyn.doctor import examine

    findings = asyncio.run(examine(_plan(at, flags)))
    ok = all(finding.level != "fail" for finding in findings)
    if as_json:
        click.echo(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        click.echo("\n".join(_lines(findings, color=sys.stdout.isatty())))
    return 0 if ok else FAILED


def _plan(at: str | None, flags: dict[str, Any]) -> Plan:
    """The settings that a node here would have, from the same flags, environment and file."""
    from p2pdyn.config import LOOPBACK, ConfigError, load
    from p2pdyn.doctor import Plan

    key = flags.pop("cluster_key")
    given = {name: value for name, value in flags.items() if value}
    environment = {name: value for name, value in os.environ.items() if name not in ("P2PDYN_CLUSTER_KEY", "P2PDYN_AT")}
    if key and os.access(key, os.R_OK):
        given["cluster_key"] = key
    elif key or not ("config" in given or environment.get("P2PDYN_CONFIG")):
        given["insecure"] = (
            True  # a bad key is a finding, not the end; and without one, say what a node with one would do
        )
    try:
        config = load(given, environment)
        address = Address.parse(at, DEFAULT_PORT) if at else Address(LOOPBACK, config.port or DEFAULT_PORT)
    except (ConfigError, ValueError) as error:
        raise Failure(str(error), USAGE) from None
    key = key or config.cluster_key
    return Plan(
        listen=config.listen if config.cluster_key or config.insecure else None,
        port=config.port,
        http=config.http,
        cluster_key=Path(key) if key else None,
        mdns=not (config.seeds or config.seeds_file),
        seeds=config.seeds,
        seeds_file=config.seeds_file,
        at=address,
        at_given=at is not None,
        builtin_models=tuple(w.model for w in config.workers or (config,) if w.engine == "builtin"),
        offline=config.offline,
    )


def _lines(findings: Sequence[Finding], color: bool) -> list[str]:
    lines = []
    for finding in findings:
        mark, paint = MARKS[finding.level]
        lines.append(f"{paint + mark + RESET if color else mark}  {finding.check:<10}  {finding.message}")
        if finding.mend and finding.level != "ok":
            lines.append(f"{'':18}-> {finding.mend}")
    counts = {level: sum(f.level == level for f in findings) for level in MARKS}
    return [*lines, "", f"{counts['fail']} failed, {counts['warn']} to look at, {counts['ok']} ok"]
