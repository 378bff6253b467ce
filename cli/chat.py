"""`p2pdyn chat`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from p2pdyn.cli.client import Client, Reply
from p2pdyn.cli.errors import USAGE, Failure

HISTORY = Path("~/.local/share/p2pdyn/chat_history")
HISTORY_LINES = 1000
HELP = "/model [NAME] shows or changes the model, /reset forgets the conversation, /quit (or Ctrl-D) ends"


@click.command(
    "chat",
    epilog="\b\nExamples:\n"
    "  p2pdyn chat\n"
    "  p2pdyn chat --at http://HOST:8000 --api-key-file keys\n"
    "  echo 'Why is the sky blue?' | p2pdyn chat\n",
)
@click.option(
    "--at", metavar="URL", envvar="P2PDYN_AT", default="http://127.0.0.1:8000", show_default=True, help="Endpoint."
)
@click.option("--model", metavar="NAME", help="Model to talk to.  [the first one served]")
@click.option(
    "--api-key-file",
    metavar="FILE",
    envvar="P2PDYN_API_KEY_FILE",
    type=click.Path(path_type=Path),
    help="File whose first line is the API key.",
)
def command(at: str, model: str | None, api_key_file: Path | None) -> None:
    """Talk to a model through any peer's HTTP endpoint.

    One line is one message; the conversation is kept until /reset. Ctrl-C stops an answer. With input from a pipe the
    answers go to stdout and all else to stderr.
    """
    client = Client(at, read_key(api_key_file))
    Chat(client, model or first_model(client)).run()


def read_key(path: Path | None) -> str | None:
    """The first key in an API key file."""
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read the API key file {path} ({error}): give a readable one", USAGE) from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise Failure(f"{path} holds no API key: write one into it", USAGE)
    return keys[0]


def first_model(client: Client) -> str:
    models = client.models()
    if not models:
        raise Failure(
            f"{client.url} knows no model yet: wait for a worker to be ready (`p2pdyn peers`), then try again"
        )
    return models[0]


class Chat:
    """One conversation on the terminal, or from a pipe."""

    def __init__(self, client: Client, model: str) -> None:
        self.client = client
        self.model = model
        self.messages: list[dict[str, str]] = []
        self.interactive = sys.stdin.isatty()

    def run(self) -> None:
        if self.interactive:
            _line_editing()
            click.echo(f"{self.model} at {self.client.url}. {HELP}.")
        while (line := self._read()) is not None:
            try:
                if not self._turn(line.strip()):
                    return
            except Failure as error:
                if not self.interactive:
                    raise
                click.echo(f"p2pdyn: {error}", err=True)

    def _read(self) -> str | None:
        try:
            return input("> ") if self.interactive else next(sys.stdin, None)
        except EOFError:
            click.echo()
            return None

    def _turn(self, line: str) -> bool:
        """One line of input; False ends the conversation."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.messages.clear()
        elif word == "/model":
            self._model(rest.strip())
        elif word.startswith("/"):
            click.echo(HELP, err=True)
        elif line:
            self._say(line)
        return True

    def _model(self, name: str) -> None:
        models = self.client.models()
        if name and name not in models:
            raise Failure(f"no model {name} here: give one of {', '.join(models) or 'none so far'}")
        self.model = name or self.model
        listed = ", ".join(f"{model} (in use)" if model == self.model else model for model in models)
        click.echo(listed, err=not self.interactive)

    def _say(self, text: str) -> None:
        asked = {"role": "user", "content": text}
        began = time.monotonic()
        reply = self.client.chat(self.model, [*self.messages, asked])
        try:
            for piece in reply.pieces:
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            reply.finish = "stopped"
        finally:
            reply.pieces.close()
        click.echo()
        self.messages += [asked, {"role": "assistant", "content": reply.text}]
        click.secho(describe(self.client, reply, time.monotonic() - began), dim=True, err=not self.interactive)


def describe(client: Client, reply: Reply, seconds: float) -> str:
    """Who answered, in a line: `[answered by w1 (4f...), 34 tokens in 1.2 s]`."""
    by = " then ".join(f"{name} ({worker})" if name else worker for worker, name in _named(client, reply.workers))
    why = f", {reply.finish}" if reply.finish not in ("", "stop") else ""
    return f"[answered by {by or 'an unnamed worker'}, {reply.tokens} tokens in {seconds:.1f} s{why}]"


def _named(client: Client, workers: tuple[str, ...]) -> list[tuple[str, str]]:
    try:
        names = {peer["id"]: peer["name"] for peer in client.get("/p2p/peers")["peers"]}
    except Failure:
        names = {}
    return [(worker, names.get(worker, "")) for worker in workers]


def _line_editing() -> None:
    """Arrow keys and the lines of earlier sessions, where Python has readline."""
    try:
        import atexit
        import readline
    except ImportError:
        return
    path = HISTORY.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    except OSError:
        return
    readline.set_history_length(HISTORY_LINES)
    atexit.register(_save_history, path)


def _save_history(path: Path) -> None:
    import readline

    try:
        readline.write_history_file(path)
    except OSError as error:
        click.echo(f"p2pdyn: the history could not be written to {path} ({error.strerror})", err=True)
