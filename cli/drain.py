"""`p2pdyn drain`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import click

from p2pdyn.cli.admin import admin_options, ask
from p2pdyn.cli.errors import Failure

MARGIN_S = 15.0
"""Beyond the node's own limit: to end what is open, say good-bye and be seen gone."""
OPEN = (("streams", "stream"), ("answers", "answer"), ("leases", "lease"), ("workers", "worker"))
"""What a node that drains counts, and the word for one of it."""


@click.command(
    "drain",
    epilog="\b\nExamples:\n"
    "  p2pdyn drain gpu-host-3                        a node by its name, asked of this host's peer\n"
    "  p2pdyn drain 0123456789abcdef --at HOST:7400   by its id, asked of another peer\n"
    "  p2pdyn drain gpu-host-3 --force                although no other worker serves its model\n"
    "\b\nRolling restart: for each node in turn\n"
    "  p2pdyn drain NODE && start it again, then wait for `p2pdyn peers` to show it ready\n",
)
@click.argument("node")
@admin_options
@click.option("--force", is_flag=True, help="Also where it is the last ready worker of a model.")
def command(node: str, at: str, cluster_key: Path | None, force: bool) -> None:
    """Have NODE, an id or a name, finish what it has and leave the cluster; return when it has left.

    It takes nothing new from now on. Streams that run after 20 seconds go on at another worker, from the tokens already
    sent, and their clients see nothing; what cannot be moved (a frontend's open answers, streams with penalties or
    guided decoding) has 80 seconds in all. SIGTERM to the node does the same. Under `node --workers` a drained worker
    stays down until its supervisor gets SIGHUP; draining the supervisor's own node drains all of its workers.

    Any peer can be asked, the node itself too. Asking again does no harm: it waits for the same end.
    """
    report = asyncio.run(ask(at, cluster_key, "drain", {"node": node, "force": force}))
    called = f"{report['name']} ({report['id']})"
    told = ""
    deadline = time.monotonic() + report["left_s"] + MARGIN_S
    while report["state"] != "left":
        if (line := progress(report)) != told:
            told = line
            click.echo(f"{called} drains: {line}", err=True)
        if time.monotonic() > deadline:
            raise Failure(f"{called} has not left in time: look at its log, or end it with SIGTERM, twice")
        seen = {"node": report["id"], "epoch": report["epoch"], "seen": report}
        report = asyncio.run(ask(at, cluster_key, "draining", seen))
    click.echo(f"{called} has left", err=True)


def progress(report: dict[str, Any]) -> str:
    """What is left, in words."""
    counts = [(report[key], word) for key, word in OPEN]
    left = [f"{count} {word}{'s' * (count != 1)}" for count, word in counts if count]
    return f"{', '.join(left)} left" if left else "nothing is open"
