"""Asking a peer over its control link."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from p2pdyn.cli.errors import USAGE, Failure
from p2pdyn.cli.log import set_up_logging
from p2pdyn.constants import DEFAULT_PORT
from p2pdyn.core.types import Address

TIMEOUT_S = 5.0

F = TypeVar("F", bound=Callable[..., Any])


def admin_options(function: F) -> F:
    """``--at`` and ``--cluster-key`` (also P2PDYN_CLUSTER_KEY, as for a node)."""
    key = click.option(
        "--cluster-key",
        metavar="FILE",
        type=click.Path(path_type=Path),
        envvar="P2PDYN_CLUSTER_KEY",
        help="The cluster's key file, where it has one.",
    )
    at = click.option(
        "--at",
        metavar="HOST:PORT",
        envvar="P2PDYN_AT",
        default=f"127.0.0.1:{DEFAULT_PORT}",
        show_default=True,
        help="Control port to ask.",
    )
    return at(key(function))


async def ask(at: str, cluster_key: Path | None, op: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer of the peer at ``at`` to an admin operation; Failure where there is none."""
    from p2pdyn.net.admin import AdminError, admin_call
    from p2pdyn.net.curve import Security
    from p2pdyn.net.sockets import Sockets

    set_up_logging("error")  # what the sockets would log is in the one sentence below
    try:
        address = Address.parse(at, DEFAULT_PORT)
        security = Security.load(cluster_key) if cluster_key else Security.insecure(allow_remote=True)
    except (ValueError, OSError) as error:
        raise Failure(str(error), USAGE) from None
    sockets = Sockets(security)
    try:
        return await admin_call(sockets, address, op, args or {}, TIMEOUT_S)
    except AdminError as error:
        raise Failure(f"{address}: {error}") from None
    except (TimeoutError, ConnectionError) as error:
        raise Failure(_no_answer(address, str(error), cluster_key is not None)) from None
    finally:
        sockets.close()


def _no_answer(address: Address, why: str, keyed: bool) -> str:
    if "--cluster-key" in why:
        return why
    key = "" if keyed else ", and --cluster-key FILE if its cluster has a key"
    return f"{why or f'no answer from {address}'}: is a node running there? Give its address with --at HOST:PORT{key}"
