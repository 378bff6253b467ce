"""Whether an address can be connected to from here: asked by `p2pdyn doctor`, here and of every peer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from typing import Any

from p2pdyn.core.types import Address

CONNECT_S = 3.0


async def reach(args: Mapping[str, Any]) -> dict[str, Any]:
    """The admin operation ``reach``: connect to ``args["address"]`` and say whether it went through.

    Only members can ask (the control link needs the cluster key); nothing is sent over the connection.
    """
    try:
        address = Address.parse(str(args["address"]))
    except (KeyError, ValueError) as error:
        return {"ok": False, "error": f"bad address: {error}"}
    why = await connect(address)
    return {"ok": not why, "error": why}


async def connect(address: Address) -> str:
    """Why a TCP connection to ``address`` fails within CONNECT_S; empty when it does not."""
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except TimeoutError:
        return f"no answer within {CONNECT_S:g} s (a firewall drops it, or the host is down)"
    except ConnectionRefusedError:
        return "refused (nothing listens there, or a firewall rejects it)"
    except socket.gaierror as error:
        return f"the name does not resolve ({error.strerror})"
    except OSError as error:
        return error.strerror or str(error)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ""
