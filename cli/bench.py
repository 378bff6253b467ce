"""`p2pdyn bench`."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path

import click

from p2pdyn.cli.errors import USAGE, Failure
from p2pdyn.core.router_cost import POLICIES


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


def _blocks(ctx: click.Context, param: click.Parameter, value: str) -> float:
    if value == "inf":
        return inf
    blocks = int(value) if value.isdecimal() else 0
    if blocks < 1:
        raise click.BadParameter(f"{value!r} is neither a number of blocks from 1 on nor 'inf'", ctx, param)
    return float(blocks)


@command.command(
    epilog="\b\nExample:\n  p2pdyn bench route --trace conversation_trace.jsonl --workers 8 --cache-blocks inf \\\n"
    "      --prefill-tps 5000 --utilization 0.9 --policy kv --policy round-robin\n"
)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Requests in Mooncake's format, one JSON object a line.",
)
@click.option("--workers", type=click.IntRange(1, 1024), default=8, show_default=True, help="Simulated workers.")
@click.option(
    "--cache-blocks",
    metavar="N|inf",
    callback=_blocks,
    default="inf",
    show_default=True,
    help="Blocks of 512 tokens that a worker's cache holds.",
)
@click.option(
    "--prefill-tps",
    type=click.FloatRange(1, 1e9),
    default=5000.0,
    show_default=True,
    help="Prefill tokens a second of each worker.",
)
@click.option(
    "--utilization",
    type=click.FloatRange(0, 2, min_open=True),
    default=0.75,
    show_default=True,
    help="Share of the time that round-robin keeps the workers busy with prefill; trace time is scaled to it.",
)
@click.option(
    "--policy", "policies", type=click.Choice(list(POLICIES)), multiple=True, help="May be repeated; default: all."
)
@click.option(
    "--spread",
    type=click.FloatRange(0, 3600),
    default=0.0,
    show_default=True,
    help="Seconds of trace time over which the requests of a timestamp are spread at random: the tick of the trace's "
    "clock, if it is coarse.",
)
@click.option("--frontends", type=click.IntRange(1, 64), default=1, show_default=True, help="That share the traffic.")
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Of the random generator: equal seeds, equal runs."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def route(
    trace: Path,
    workers: int,
    cache_blocks: float,
    prefill_tps: float,
    utilization: float,
    policies: tuple[str, ...],
    spread: float,
    frontends: int,
    seed: int,
    as_json: bool,
) -> None:
    """Routing policies side by side: a trace through the real router against simulated workers with real caches."""
    from p2pdyn.sim import bench_route, route_trace

    setting = bench_route.Setting((prefill_tps,) * workers, cache_blocks, utilization, frontends, seed, spread)
    chosen = list(dict.fromkeys(policies)) or list(POLICIES)
    try:
        report = bench_route.run(route_trace.load(trace), chosen, setting, bench_route.show)
    except route_trace.TraceError as error:
        raise Failure(f"{error}.", USAGE) from error
    finally:
        bench_route.show("")
    click.echo(json.dumps({"trace": trace.name, **report}) if as_json else bench_route.render(report))
