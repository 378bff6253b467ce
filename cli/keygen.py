"""`p2pdyn keygen`."""

from __future__ import annotations

from pathlib import Path

import click

from p2pdyn.cli.errors import USAGE, Failure


@click.command("keygen", epilog="\b\nExample:\n  p2pdyn keygen cluster.key && scp cluster.key HOST:\n")
@click.argument("file", type=click.Path(path_type=Path))
def command(file: Path) -> None:
    """Write a new cluster key to FILE (mode 600; an existing file is never overwritten).

    Give every node the same file with --cluster-key: it turns on encryption and keeps out everybody without it. To
    change the key of a running cluster, give each node [old, new], then [new, old], then [new].
    """
    from p2pdyn.net.curve import write_key_file

    if file.exists():
        raise Failure(f"{file} exists: give a new name, or remove it if no node uses it", USAGE)
    try:
        fingerprint = write_key_file(file)
    except ValueError as error:
        raise Failure(str(error)) from None
    click.echo(
        f"wrote {file} (fingerprint {fingerprint}): copy it to every host over a safe channel, and start each node"
    )
    click.echo(f"with --cluster-key {file}")
