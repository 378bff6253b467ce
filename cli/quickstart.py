"""`p2pdyn quickstart`: the whole system on one host, each peer a process of its own, with nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from p2pdyn.cli.chat import describe, first_model
from p2pdyn.cli.client import Client
from p2pdyn.cli.errors import USAGE, Failure
from p2pdyn.cli.peers import table
from p2pdyn.config import DEFAULT_HTTP, child_environment
from p2pdyn.core.types import Address

QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 96
POLL_S = 0.25
STOP_S = 15.0
"""A node without open requests leaves within two seconds; then its processes are killed."""
FATAL = re.compile(r"^(?:\S+ \| )?p2pdyn: (.+)$", re.MULTILINE)
"""The sentence with which a node ends, the workers' own included."""


@click.command(
    "quickstart",
    epilog="\b\nExamples:\n"
    "  p2pdyn quickstart --once       one question, one answer, done\n"
    "  p2pdyn quickstart --workers 3  and keep serving\n",
)
@click.option("--workers", type=click.IntRange(1, 16), default=2, show_default=True, help="Worker peers.")
@click.option("--http", metavar="HOST:PORT", help=f"Where the endpoint listens.  [{DEFAULT_HTTP}]")
@click.option("--once", is_flag=True, help="Exit after the answer.")
@click.option("--engine", default="builtin", hidden=True)
def command(workers: int, http: str | None, once: bool, engine: str) -> int:
    """Try it: a cluster on this host, encrypted, with a small real model, and one chat through it.

    Starts an endpoint and two workers as processes of their own, asks them a question, and serves until Ctrl-C. The
    first run downloads the model (SmolLM2-135M, about 100 MB); later ones need no network.
    """
    signal.signal(signal.SIGTERM, _terminated)
    address = _free_address(http, once)
    with _cluster(workers, address, engine) as node:
        client = Client(f"http://{address}")
        _wait_until_ready(node, client, workers)
        _ask(client)
        click.echo("\n" + "\n".join(table(client.get("/p2p/peers"), color=sys.stdout.isatty())))
        return 0 if once else _serve(node, client)


def _terminated(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _free_address(http: str | None, once: bool) -> Address:
    """Where to listen: as asked, else the default, else (with --once) any free port."""
    try:
        address = Address.parse(http) if http else DEFAULT_HTTP
    except ValueError as error:
        raise Failure(f"--http is wrong: {error}", USAGE) from None
    if not address.is_loopback:
        raise Failure(f"quickstart serves this host only, not {address}: for others start `p2pdyn node`", USAGE)
    try:
        return Address(address.host, _bind(address))
    except OSError as error:
        if http or not once:
            raise Failure(
                f"cannot listen on {address} ({error.strerror}): give a free port with --http HOST:PORT"
            ) from None
    free = Address(address.host, _bind(Address(address.host, 0)))
    click.echo(f"port {address.port} is taken: using {free}")
    return free


def _bind(address: Address) -> int:
    """Try the port, and find one for port 0."""
    family, _, _, _, target = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(target)
        port: int = probe.getsockname()[1]
        return port


class _Node:
    """The supervisor's process; its workers end with it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    def check(self) -> None:
        """Raise Failure with the node's, or a worker's, own last sentence once it has ended."""
        text = self._log.read_text(errors="replace")
        fatal = FATAL.search(text)
        if fatal:
            raise Failure(fatal[1])
        if self.process.poll() is not None:
            tail = "\n".join(text.splitlines()[-20:])
            raise Failure(f"the cluster ended (exit code {self.process.returncode}); its last messages:\n{tail}")

    @property
    def ready(self) -> bool:
        assert self.process.stdout is not None
        line: bytes | None = self.process.stdout.readline()
        return bool(line)


@contextlib.contextmanager
def _cluster(workers: int, http: Address, engine: str) -> Iterator[_Node]:
    from p2pdyn.net.curve import write_key_file

    with tempfile.TemporaryDirectory(prefix="p2pdyn-") as name:
        folder = Path(name)
        key, log = folder / "cluster.key", folder / "log"
        write_key_file(key)
        options: dict[str, object] = {
            "engine": engine,
            "workers": workers,
            "http": http,
            "listen": http.host,
            "port": 0,
            "cluster": f"quickstart-{secrets.token_hex(4)}",
            "cluster-key": key,
            "data-dir": folder / "data",
            "name": "demo",
            "supervised-by": os.getpid(),
        }
        process = _start([f"--{option}={value}" for option, value in options.items()], log)
        try:
            yield _Node(process, log)
        finally:
            _stop(process)


def _start(options: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "p2pdyn", "node", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=child_environment(os.environ),
            start_new_session=True,  # Ctrl-C is for this process, which then stops the node
        )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _wait_until_ready(node: _Node, client: Client, workers: int) -> None:
    """Loading may take long (a download): its progress is shown, and any process that fails ends it."""
    click.echo(f"starting a cluster: an endpoint and {workers} workers, encrypted, on this host only")
    began, shown = time.monotonic(), ""
    while not node.ready:
        node.check()
        told = _progress(client)
        if told and told != shown:
            shown = told
            click.echo(f"\r{told}\x1b[K" if sys.stdout.isatty() else told, nl=not sys.stdout.isatty())
        time.sleep(POLL_S)
    if sys.stdout.isatty():
        click.echo("\r\x1b[K", nl=False)
    click.echo(f"ready after {time.monotonic() - began:.1f} s at {client.url}\n")


def _progress(client: Client) -> str:
    try:
        peers: list[dict[str, Any]] = client.get("/p2p/peers")["peers"]
    except Failure:
        return ""
    parts = []
    for peer in peers:
        if peer["engine"] != "none":
            # In tens of percent, so that a log without a terminal stays short.
            share = f" {round(peer['progress'] * 10) * 10} %" if peer["state"] == "loading" else ""
            parts.append(f"{peer['name']}: {peer['state']}{share}{' ' * bool(peer['detail'])}{peer['detail']}")
    return "; ".join(parts)


def _ask(client: Client) -> None:
    model = first_model(client)
    click.echo(f"you: {QUESTION}\n{model}: ", nl=False)
    began = time.monotonic()
    reply = client.chat(model, [{"role": "user", "content": QUESTION}], max_tokens=ANSWER_TOKENS, temperature=0)
    for piece in reply.pieces:
        click.echo(piece, nl=False)
    click.echo(f"\n{describe(client, reply, time.monotonic() - began)}")


def _serve(node: _Node, client: Client) -> int:
    model = first_model(client)
    click.echo(
        f"\nserving at {client.url} until Ctrl-C; in another terminal:\n\n"
        f"  p2pdyn chat --at {client.url}\n\n"
        f"  curl {client.url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n'
    )
    try:
        while node.process.poll() is None:
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        click.echo("stopping")
        return 0
    node.check()
    raise Failure("the cluster ended without a word: start quickstart again")
