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

    try:
        write_key_file(file)
    except FileExistsError:
        raise Failure(f"{file} exists: give a new name, or remove it if no node uses it", USAGE) from None
    except OSError as why:
        raise Failure(f"cannot write {file} ({why.strerror}): give a path in a folder you may write") from None
    click.echo(f"wrote {file}: copy it to every host over a safe channel, and start nodes with --cluster-key {file}")
