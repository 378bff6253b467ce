"""`p2pdyn bench`."""

from __future__ import annotations

import json

import click


@click.group("bench")
def command() -> None:
    """Measure parts of p2pdyn. Every figure is printed with what it was measured under."""


@command.command(epilog="\b\nExample:\n  p2pdyn bench membership --nodes 1000 --loss 0.1 --links tcp\n")
@click.option("--nodes", type=click.IntRange(2, 10_000), default=100, show_default=True, help="Simulated peers.")
@click.option("--loss", type=click.FloatRange(0, 0.9), default=0.1, show_default=True, help="Share of packets lost.")
@click.option("--links", type=click.Choice(["datagram", "tcp"]), default="tcp", show_default=True, help="Link model.")
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Of the random generator: equal seeds, equal runs."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def membership(nodes: int, loss: float, links: str, seed: int, as_json: bool) -> None:
    """Failure detection in simulated time: crash peers and time, over all observers, how long each takes to know."""
    from p2pdyn.sim import bench_membership

    report = bench_membership.run(nodes=nodes, loss=loss, links=links, seed=seed)
    click.echo(json.dumps(report) if as_json else bench_membership.render(report))
