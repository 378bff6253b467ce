"""Who a client is, for shares and turns: by its API key where keys are on, else by its address."""

from __future__ import annotations

import ipaddress
from typing import Any


def host_of(peer: Any) -> str:
    """The host of a socket's peer name. An IPv6 host has its /64 for itself, so that stands for it; IPv4 addresses
    written as IPv6 are IPv4. Empty where there is no address (a Unix socket)."""
    host = peer[0] if isinstance(peer, tuple) and peer else ""
    if ":" not in host:
        return str(host)
    address = ipaddress.IPv6Address(host.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64)) + "/64"
