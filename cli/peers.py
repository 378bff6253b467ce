"""`p2pdyn peers`."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from p2pdyn.cli.admin import admin_options, ask
from p2pdyn.cli.errors import Failure

WATCH_S = 1.0
GREEN, YELLOW, RED, DIM, RESET = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[2m", "\x1b[0m"
COLORS = {"ready": GREEN, "dead": RED, "incompatible": RED, "suspect": YELLOW, "stalled": YELLOW, "left": DIM}
HOME, CLEAR_LINE, CLEAR_BELOW, HIDE, SHOW = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[?25l", "\x1b[?25h"
HEADER = ("NAME", "ID", "STATE", "ROLE", "ENGINE", "MODEL", "ADDRESS", "REQUESTS", "KV", "SEEN")


@click.command(
    "peers",
    epilog="\b\nExamples:\n"
    "  p2pdyn peers                                 as this host's peer sees it\n"
    "  p2pdyn peers --watch --cluster-key FILE      the same, every second\n"
    "  p2pdyn peers --at HOST:7400 --json | jq '.peers[] | {name, state}'\n",
)
@admin_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --watch one a line.")
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
def command(at: str, cluster_key: Path | None, as_json: bool, watch: bool) -> None:
    """Show the cluster as one peer sees it: who is there, in what state, with which model and load."""
    if watch:
        _watch(at, cluster_key, as_json)
        return
    report = asyncio.run(ask(at, cluster_key, "peers"))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo("\n".join(table(report, color=sys.stdout.isatty())))


def _watch(at: str, cluster_key: Path | None, as_json: bool) -> None:
    screen = sys.stdout.isatty() and not as_json
    if screen:
        click.echo(HIDE + "\x1b[2J", nl=False)
    try:
        while True:
            started = time.monotonic()
            try:
                report = asyncio.run(ask(at, cluster_key, "peers"))
            except Failure as error:
                if not screen:
                    raise
                lines = [time.strftime("%H:%M:%S"), "", str(error)]
            else:
                lines = [json.dumps(report)] if as_json else [*table(report, color=screen)]
            _show(lines, screen)
            time.sleep(max(0.0, WATCH_S - (time.monotonic() - started)))
    finally:
        if screen:
            click.echo(SHOW, nl=False)


def _show(lines: Sequence[str], screen: bool) -> None:
    if screen:
        click.echo(HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW, nl=False)
    else:
        click.echo("\n".join(lines))
    sys.stdout.flush()


def table(report: dict[str, Any], *, color: bool = False) -> list[str]:
    """The report as lines, cut to the terminal's width where it is one. ``*`` marks the peer that was asked."""
    peers = report["peers"]
    rows = [HEADER, *(_row(peer, peer["id"] == report["self"]) for peer in peers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    ready = sum(peer["state"] == "ready" for peer in peers)
    lines = [f"cluster {report['cluster']}: {len(peers)} peer{'s' * (len(peers) != 1)}, {ready} ready", ""]
    for row, peer in zip(rows, [None, *peers], strict=True):
        line = "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()[:width]
        if color and peer is not None and peer["state"] in COLORS:
            line = f"{COLORS[peer['state']]}{line}{RESET}"
        lines.append(line)
    notes = [f"{peer['name']}: {peer['detail']}" for peer in peers if peer["detail"] and peer["state"] != "loading"]
    notes += [str(alarm) for alarm in report.get("alarms", [])]
    return [*lines, *([""] if notes else []), *notes]


def _row(peer: dict[str, Any], own: bool) -> tuple[str, ...]:
    state, load = peer["state"], peer["load"]
    if state == "loading" and peer["progress"]:
        state = f"loading {peer['progress']:.0%}"
    queued = f"+{load['queued']}" if load["queued"] else ""
    return (
        peer["name"] + "*" * own,
        peer["id"],
        state,
        peer["role"],
        f"{peer['engine']} {peer['engine_version']}".rstrip(),
        ",".join(peer["models"]) or "-",
        peer["address"],
        "-" if load["active_requests"] is None else f"{load['active_requests']}{queued}",
        f"{load['kv_used'] / load['kv_total']:.0%}" if load["kv_total"] else "-",
        f"{peer['last_seen_s']:.1f}s",
    )
