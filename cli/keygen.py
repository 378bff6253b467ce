"""`p2pdyn keygen`."""

from __future__ import annotations

from pathlib import Path

import click

from p2pdyn.cli.errors import USAGE, Failure

EXAMPLES = """\b
Examples:
  p2pdyn keygen cluster.key && scp cluster.key HOST:     a new key, for every host
\b
To replace the key of a running cluster, with no gap:
  p2pdyn keygen --add cluster.key     then give the file to every node, one after the other
  p2pdyn keygen --swap cluster.key    when all have it: the same again
  p2pdyn keygen --drop cluster.key    and once more; the old key is worth nothing then
A node takes a changed file at `kill -HUP PID` or at its restart. HUP after --swap cuts the node's
connections for a moment, and its running requests go on elsewhere.
"""

NEXT = {
    "add": "now holds a new key behind the one in use: give it to every node (HUP or restart), then `keygen --swap`",
    "swap": "now serves with the new key first: give it to every node (HUP or restart), then `keygen --drop`",
    "drop": "now holds its first key alone: give it to every node (HUP or restart), and the rotation is done",
}


@click.command("keygen", epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--add", "step", flag_value="add", help="Add a new key behind the one in FILE.")
@click.option("--swap", "step", flag_value="swap", help="Put the new key first: nodes serve with it.")
@click.option("--drop", "step", flag_value="drop", help="Remove the old key, the second one.")
def command(file: Path, step: str | None) -> None:
    """Write a new cluster key to FILE (mode 600; an existing file is never overwritten), or replace the key in it step
    by step.

    Give every node the same file with --cluster-key: it turns on encryption and keeps out everybody without it.
    """
    from p2pdyn.net.curve import rotate_key_file, write_key_file

    try:
        if step is not None:
            prints = rotate_key_file(file, step).fingerprint.replace(",", ", ")
            click.echo(f"{file} {NEXT[step]}")
            click.echo(f"fingerprints, the serving key first: {prints}")
            return
        if file.exists():
            raise Failure(f"{file} exists: give a new name, or replace the key in it with --add", USAGE)
        fingerprint = write_key_file(file)
    except ValueError as error:
        raise Failure(str(error)) from None
    click.echo(
        f"wrote {file} (fingerprint {fingerprint}): copy it to every host over a safe channel, and start each node"
    )
    click.echo(f"with --cluster-key {file}")
