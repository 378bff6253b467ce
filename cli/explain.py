"""`p2pdyn explain`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import click

from p2pdyn.cli.admin import admin_options, ask

HEADER = ("", "WORKER", "RANK", "STATE", "MATCHED", "PREFILL", "DECODE", "COST")


@click.command(
    "explain",
    epilog="\b\nExamples:\n"
    "  p2pdyn explain 'What is a KV cache?'                 asked of this host's peer\n"
    '  p2pdyn explain --at HOST:7400 --json "$(cat long)"   as one JSON object\n',
)
@click.argument("prompt")
@admin_options
@click.option("--model", metavar="NAME", help="Where the cluster serves several.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["auto", "chat", "completion"]),
    default="auto",
    show_default=True,
    help="PROMPT is a chat message or the text of a completion; auto: what more is cached of.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(prompt: str, at: str, cluster_key: Path | None, model: str | None, form: str, as_json: bool) -> None:
    """Tell which worker would take PROMPT now, and why, without running it.

    Ask a peer that has an HTTP endpoint: it answers by what it knows of each worker's KV cache and load. MATCHED are
    leading KV blocks of the prompt that a worker holds or is about to; PREFILL and DECODE are blocks that it has still
    to compute and that its requests hold; COST is what the policy compares, seconds for `kv`.
    """
    answer = asyncio.run(ask(at, cluster_key, "explain", {"prompt": prompt, "model": model, "form": form}))
    click.echo(json.dumps(answer) if as_json else "\n".join(table(answer)))


def table(answer: dict[str, Any]) -> list[str]:
    """The answer as lines; ``*`` marks the choice."""
    rows = [HEADER]
    for one in sorted(answer["candidates"], key=lambda row: (row["cost"] is None, row["cost"])):
        chosen = (one["id"], one["dp_rank"]) == (answer["chosen"], answer["chosen_rank"])
        cost = "-" if one["cost"] is None else f"{one['cost']:.4g}"
        numbers = (one["matched"], one["active_prefill_blocks"], one["decode_blocks"])
        rows.append(("*" * chosen, one["id"], str(one["dp_rank"]), one["state"], *map(str, numbers), cost))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"model {answer['model']}, {answer['prompt_blocks']} blocks as {answer['form']}, policy {answer['policy']}"
    notes = legs(answer.get("prefill"), answer.get("pull"))
    return [f"{head} ({answer['why']}): worker {answer['chosen']}", *notes, "", *lines]


def legs(prefill: dict[str, Any] | None, pull: dict[str, Any] | None) -> list[str]:
    """Who else takes part, a line each."""
    lines = []
    if prefill is not None:
        worker, remote_s = prefill["worker"], prefill["remote_s"]
        where = f"by prefill worker {worker}" if prefill["remote"] else "by itself"
        seconds = f"{prefill['local_s']:.3g} s by itself"
        if remote_s is not None:
            seconds += f", {remote_s:.3g} s by {worker}"
        lines.append(f"prompt computed {where} ({prefill['why']}: {seconds})")
    if pull is not None:
        seconds = f"{pull['pull_s']:.3g} s, {pull['compute_s']:.3g} s to compute them"
        lines.append(f"{pull['blocks']} blocks taken from worker {pull['worker']} ({seconds})")
    return lines
