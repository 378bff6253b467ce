"""Entry point of the `p2pdyn` command.

Each command's module is imported when it is run (or its own help is asked for), so that a node imports what it needs
and `p2pdyn --help` almost nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from p2pdyn import __version__
from p2pdyn.cli.errors import FAILED, INTERRUPTED, USAGE, Failure

COMMANDS = {
    "node": "Start a peer on this host.",
    "quickstart": "Try it: a small cluster on this host, and one chat through it.",
    "chat": "Talk to a model through any peer's HTTP endpoint.",
    "peers": "Show the cluster as one peer sees it.",
    "drain": "Have a node finish what it has, and leave.",
    "explain": "Tell which worker would take a prompt, and why.",
    "keygen": "Write a new cluster key file.",
    "doctor": "Check this host: interfaces, multicast, ports, clock, key, engines.",
    "bench": "Measure parts of p2pdyn.",
}
"""Name (and module in this package) -> one line of help."""


class Commands(click.Group):
    """Click's group over :data:`COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"p2pdyn.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExamples:\n"
    "  p2pdyn quickstart                       a cluster with a small model on this host\n"
    "  p2pdyn keygen cluster.key               then copy it to every host\n"
    "  p2pdyn node --cluster-key cluster.key   on every host: peers find each other by mDNS\n"
    "  p2pdyn peers --cluster-key cluster.key  who is there\n"
    "  p2pdyn chat --at http://HOST:8000       talk to the model\n",
)
@click.version_option(__version__, prog_name="p2pdyn", message="%(prog)s %(version)s")
def group() -> None:
    """Serve LLMs from a cluster of peers: no broker, no master.

    Start `p2pdyn node` on each host. Peers find each other, watch each other's health and route each request to the
    worker that will answer soonest; any peer can be the OpenAI-compatible endpoint.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 (failed), 2 (bad usage or configuration) or 130 (Ctrl-C)."""
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        code = 0  # the reader has enough
    except KeyboardInterrupt:
        code = INTERRUPTED
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            # What it still holds goes nowhere, or the interpreter's own flush at exit would end with code 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        with group.make_context("p2pdyn", arguments) as context:
            result = group.invoke(context)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as end:
        return int(end.exit_code)
    except click.exceptions.NoArgsIsHelpError as ask:
        click.echo(ask.ctx.get_help() if ask.ctx else "", err=True)
        return USAGE
    except click.Abort:
        return INTERRUPTED
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "p2pdyn"
        text = " ".join(error.format_message().split()).rstrip(".")
        return _say(f"{text}: see `{where} --help`", USAGE)
    except click.ClickException as error:
        return _say(error.format_message(), FAILED)
    except Failure as error:
        return _say(str(error), error.code)


def _say(sentence: str, code: int) -> int:
    click.echo(f"p2pdyn: {sentence}", err=True)
    return code
