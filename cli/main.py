"""Entry point of the `p2pdyn` command."""

from __future__ import annotations

import click


@click.group()
def main() -> None:
    """Serve LLMs from a cluster of peers: no broker, no master."""
