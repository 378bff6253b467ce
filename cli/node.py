"""`p2pdyn node`."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import click

from p2pdyn.cli.errors import FAILED, USAGE, Failure
from p2pdyn.cli.log import set_up_logging
from p2pdyn.config import Config, ConfigError, ReadyInfo, StartError, load
from p2pdyn.core.types import ROLES
from p2pdyn.settings import ENGINES, LOG_LEVELS, ROUTERS, TRANSFERS

EXAMPLES = """\b
Examples:
  p2pdyn node                                          a model and an endpoint on this host alone
  p2pdyn node --cluster-key cluster.key                join the peers that mDNS finds
  p2pdyn node --cluster-key cluster.key --seed HOST    the same without multicast
  p2pdyn node --engine none --http 0.0.0.0:8000 --cluster-key cluster.key --api-key-file keys
                                                       an endpoint without an engine
  p2pdyn node --engine sim --workers 4 -- --itl-ms 5   four simulated workers, arguments for each
"""


class NodeCommand(click.Command):
    """Takes what stands behind ``--`` as the engine's arguments and refuses stray words before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            place = args.index("--")
            ctx.meta["engine_args"] = tuple(args[place + 1 :])
            args = args[:place]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] [-- ENGINE ARGUMENTS]")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from p2pdyn.engines.registry import ENGINES

        super().format_epilog(ctx, formatter)
        with formatter.section("Engine arguments and their defaults"):
            formatter.write_dl([(name, kind.help) for name, kind in ENGINES.items()])


def choice(values: tuple[str, ...]) -> str:
    """The values as a metavar: they are checked where those of the environment and the file are, in one wording."""
    return f"[{'|'.join(values)}]"


OPTIONS: list[Callable[[Any], Any]] = [
    click.option(
        "--engine",
        metavar=choice((*ENGINES, "MODULE:FACTORY")),
        help="What runs the model; none: only an endpoint.  [builtin]",
    ),
    click.option("--model", metavar="NAME|PATH", help="Model to serve; builtin has one of its own."),
    click.option("--served-model-name", metavar="NAME", help="Name that clients ask for.  [the model folder's name]"),
    click.option("--role", metavar=choice(ROLES), help="Part of the work that this worker takes.  [aggregated]"),
    click.option("--http", metavar="HOST:PORT", help="Where the OpenAI endpoint listens.  [127.0.0.1:8000]"),
    click.option("--no-http", is_flag=True, default=None, help="No endpoint here."),
    click.option(
        "--listen",
        metavar="ADDRESS",
        help="Address or interface for peers.  [loopback; with a key: the best interface]",
    ),
    click.option("--port", metavar="BASE", help="First of four ports for peers; 0: free ones.  [7400]"),
    click.option("--seed", metavar="HOST:PORT", multiple=True, help="A peer to join through; may be repeated."),
    click.option("--seeds-file", metavar="FILE", help="Seeds, one a line; read again when it changes."),
    click.option(
        "--mdns/--no-mdns", default=None, help="Find peers by multicast.  [on, unless loopback only or seeds]"
    ),
    click.option("--cluster", metavar="NAME", help="Only peers of the same cluster name join.  [default]"),
    click.option("--cluster-key", metavar="FILE", help="Key file: encrypts, and keeps out who has another."),
    click.option("--insecure", is_flag=True, default=None, help="Allow other than loopback addresses without a key."),
    click.option("--data-dir", metavar="DIR", help="Where the node's id lives.  [~/.local/share/p2pdyn/NAME or node]"),
    click.option("--name", metavar="NAME", help="What to call this node.  [the host's name]"),
    click.option("--router", metavar=choice(ROUTERS), help=f"How requests find their worker.  [{ROUTERS[0]}]"),
    click.option(
        "--kv-transfer",
        metavar=choice(TRANSFERS),
        help="What moves KV blocks between workers; auto: nixl where it is installed, else tcp.  [auto]",
    ),
    click.option("--config", metavar="FILE.toml", help="Settings from a file, named as these options."),
    click.option("--workers", metavar="N", help="Run N workers under this node and restart those that end."),
    click.option("--gpus-per-worker", metavar="K", help="GPUs for each worker.  [1 for engines that need one]"),
    click.option(
        "--api-key-file", metavar="FILE", help="API keys, one a line, that clients of the endpoint must have."
    ),
    click.option("--tls-cert", metavar="FILE", help="Serve HTTPS with this certificate chain."),
    click.option("--tls-key", metavar="FILE", help="Its private key."),
    click.option("--offline", is_flag=True, default=None, help="Download nothing."),
    click.option("--log-level", metavar=choice(LOG_LEVELS), help="Least severe log message on stderr.  [info]"),
    click.option("--supervised-by", type=int, hidden=True),
]


def with_options(function: Any) -> Any:
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.command("node", cls=NodeCommand, epilog=EXAMPLES)
@with_options
@click.pass_context
def command(context: click.Context, /, supervised_by: int | None, **flags: object) -> int:
    """Start a peer on this host: a worker with its engine, the OpenAI endpoint, or both.

    Prints one line, `ready node=...`, when it serves. SIGTERM or Ctrl-C drains it: running requests finish, or go on at
    another worker (see `p2pdyn drain --help`); a second one ends it at once. SIGHUP reads --cluster-key,
    --api-key-file, --tls-cert and --tls-key again, and starts drained workers again. Each option is also a variable
    (P2PDYN_SEEDS_FILE for --seeds-file) and a line of the --config file (seeds_file = "..."); options win over
    variables, those over the file.
    """
    try:
        config = load({**flags, "engine_args": context.meta.get("engine_args")}, os.environ)
        set_up_logging(config.log_level)
        return serve(config, supervised_by)
    except ConfigError as error:
        raise Failure(str(error), USAGE) from None
    except StartError as error:
        raise Failure(str(error), FAILED) from None


def serve(config: Config, supervised_by: int | None = None) -> int:
    """Run the node, or the supervisor and its workers, until a signal; the exit code."""
    import uvloop

    if supervised_by is not None:
        from p2pdyn.supervisor import die_with_parent

        die_with_parent(supervised_by)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config))


async def _serve(config: Config) -> int:
    if config.workers:
        from p2pdyn.supervisor import run
    else:
        from p2pdyn.node import run

    stop, reload = asyncio.Event(), asyncio.Event()
    began: list[ReadyInfo] = []
    caught: list[int] = []

    def ready(info: ReadyInfo) -> None:
        began.append(info)
        click.echo(info.line)

    peer = asyncio.ensure_future(run(config, ready=ready, stop=stop, reload=reload))

    def caught_signal(number: int) -> None:
        caught.append(number)
        stop.set()
        if not began and not config.workers:
            # Loading a model takes long, and nothing is served yet.
            peer.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, caught_signal, number)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    try:
        return await peer
    except asyncio.CancelledError:
        return 128 + caught[0] if caught else FAILED
