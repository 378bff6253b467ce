"""Introduces peers of one local network to each other by multicast DNS (RFC 6762, RFC 6763), with python-zeroconf.

It only introduces.  Records live for over an hour after their owner lost power, so an expired or withdrawn record says
nothing about a peer: membership alone removes.  The TXT record carries cluster, node id, name, version and a
fingerprint of the cluster key, so that peers that cannot talk to each other can still say why.  None of it is trusted:
the CURVE handshake decides who joins.

The instance name ends in a random suffix, new at each boot: no two announcements ever conflict, so the 1.5 s of probing
for conflicts are skipped, and of two peers with one node id both stay visible (membership settles that).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import random
import secrets
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zeroconf import Error as ZeroconfError
from zeroconf import ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from p2pdyn import __version__
from p2pdyn.core.types import Address
from p2pdyn.net import interfaces as nics
from p2pdyn.net.interfaces import Interface

log = logging.getLogger(__name__)

SERVICE = "_p2pdyn._tcp.local."
GROUP4, GROUP6 = "224.0.0.251", "ff02::fb"

RESOLVE_MS = 3000
"""Patience for a peer's SRV, TXT and address records; its announcement usually carries them all."""

POLL_S = 2.0
"""How often the interfaces are looked at (about 1 ms): a cable plugged in is announced on within this time."""

REQUERY_MIN_S, REQUERY_MAX_S = 10.0, 300.0
"""Ask the network again after this long, doubling: zeroconf's own schedule ends, and a switch may have been split when
a peer announced itself. One query and its answers, with known answers suppressed, a peer each five minutes."""

MAX_RESOLVING = 256
MAX_REPORTED = 1024
"""Bounds on what a hostile local network can make us hold."""

_LABEL_MAX = 63
_TROUBLE = (OSError, RuntimeError, ValueError, TimeoutError, ZeroconfError)


@dataclass(frozen=True, slots=True)
class Announcement:
    """What one peer says of itself. ``key``: fingerprints of its one or two cluster keys, comma-separated, or empty."""

    id: str
    cluster: str
    name: str
    key: str
    version: str
    port: int
    addresses: tuple[str, ...]

    @property
    def txt(self) -> dict[str, str]:
        fields = {"id": self.id, "cluster": self.cluster, "name": self.name, "key": self.key, "version": self.version}
        return fields | {"port": str(self.port)}


def read_announcement(
    properties: Mapping[str, str | None], port: int | None, addresses: Sequence[str]
) -> Announcement | None:
    """The announcement in a resolved service, or None when it is not one of ours (a field missing or out of range)."""
    text = {key: value or "" for key, value in properties.items()}
    if not port or not addresses or not text.get("id") or not text.get("cluster"):
        return None
    fields = (text["id"], text["cluster"], text.get("name", ""), text.get("key", ""), text.get("version", ""))
    return Announcement(*fields, port, tuple(addresses)) if all(f.isprintable() for f in fields) else None


def refusal(theirs: Announcement, our_key: str) -> str:
    """Why this peer of our own cluster cannot join, as a sentence with the mend; empty when the keys match."""
    if theirs.key == our_key or set(theirs.key.split(",")) & set(our_key.split(",")):
        return ""
    who = f"peer {theirs.name or theirs.id} ({theirs.id}) at {Address(theirs.addresses[0], theirs.port)}"
    where = f"announces cluster {theirs.cluster!r}"
    if not our_key:
        return f"{who} {where} with a cluster key and this peer has none: start this one with --cluster-key FILE"
    if not theirs.key:
        return f"{who} {where} without a cluster key and this peer has one: start that one with --cluster-key FILE"
    return (
        f"{who} {where} with another cluster key (fingerprint {theirs.key}, here {our_key}): "
        f"give both the same --cluster-key FILE"
    )


def nearest(addresses: Sequence[str], networks: Sequence[str]) -> list[str]:
    """Which addresses of a peer to try: those in our own networks, else the routable ones, else scoped link-local."""
    ours = [ipaddress.ip_network(n, strict=False) for n in networks]
    classes: tuple[list[str], list[str], list[str]] = ([], [], [])
    for text in addresses:
        ip = ipaddress.ip_address(text)
        if ip.is_link_local:
            if ip.version == 4 or "%" in text:
                classes[2].append(text)
        else:
            classes[0 if any(ip in n for n in ours) else 1].append(text)
    return next((c for c in classes if c), [])


class Mdns:
    """Announces this peer and reports others. ``addresses`` and ``port`` are what to announce (control link).

    ``interfaces`` are the ones to speak on, followed by name as they come, go and change address.  ``on_peer`` is
    called with each address of each peer of the same cluster, again whenever it is heard of; ``on_refused`` once for
    each peer whose key does not match ours, with its address and a sentence for the log.
    """

    def __init__(
        self,
        *,
        node: str,
        cluster: str,
        name: str,
        port: int,
        addresses: Sequence[str],
        key_fingerprint: str,
        interfaces: Sequence[Interface],
        on_peer: Callable[[Address, dict[str, str]], None],
        on_refused: Callable[[Address, str], None],
    ) -> None:
        self.local = Announcement(node, cluster, name, key_fingerprint, __version__, port, tuple(addresses))
        self._interfaces = {i.name: i for i in interfaces}
        self.running = True
        self._on_peer = on_peer
        self._on_refused = on_refused
        self._reported: set[tuple[str, str]] = set()
        self._warned: set[str] = set()
        self._choices: list[str | int] = []
        self._networks = _networks(interfaces)
        self._info = _service_info(self.local)
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._resolving: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Announce and browse. Network trouble is a warning and tried again: peers may still come through seeds."""
        self._choices = self._usable_choices(list(self._interfaces.values()))
        await self._ask()
        self._keep(asyncio.create_task(self._watch(), name="mdns-watch"))

    async def close(self) -> None:
        """Say goodbye (which other peers ignore) and close; bounded to a few seconds."""
        tasks = [*self._tasks, *self._resolving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._shut()

    def announce_key(self, fingerprint: str) -> None:
        """The cluster key was changed: announce it, and judge others by it from now on."""
        self.local = replace(self.local, key=fingerprint)
        self._info = renamed = _service_info(self.local, self._info)
        if self._zeroconf is not None:
            self._keep(asyncio.create_task(self._update(self._zeroconf, renamed), name="mdns-update"))

    async def _update(self, zeroconf: AsyncZeroconf, info: AsyncServiceInfo) -> None:
        try:
            await (await zeroconf.async_update_service(info))
        except _TROUBLE as error:
            log.warning("mDNS could not announce the new cluster key (%s): peers learn of it later", error)

    # ---- zeroconf's life ----

    async def _ask(self) -> None:
        """Ask the network who is there, now; where it could not be opened before, try again."""
        if self._zeroconf is not None:
            self._browse()
            return
        try:
            await self._open()
        except _TROUBLE as error:
            if self.running:
                log.warning("mDNS is off for now (%s): name peers with --seed, or free UDP port 5353", error)
            self.running = False
            await self._shut()
        else:
            if not self.running:
                log.info("mDNS is on again")
            self.running = True

    async def _open(self) -> None:
        self._zeroconf = AsyncZeroconf(interfaces=self._choices)
        announced = await self._zeroconf.async_register_service(self._info, cooperating_responders=True)
        self._keep(asyncio.ensure_future(announced))
        self._browse()

    async def _shut(self) -> None:
        zeroconf, self._zeroconf, self._browser = self._zeroconf, None, None
        if zeroconf is not None:
            with contextlib.suppress(TimeoutError, OSError, ZeroconfError):
                await asyncio.wait_for(zeroconf.async_close(), 3)

    def _browse(self) -> None:
        """A new browser queries within 120 ms and also reports what is in the cache."""
        assert self._zeroconf is not None
        if self._browser is not None:
            self._keep(asyncio.ensure_future(self._browser.async_cancel()))
        self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE, handlers=[self._changed])

    def _keep(self, task: asyncio.Future[Any]) -> None:
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- interfaces come and go ----

    async def _watch(self) -> None:
        wait, loop = REQUERY_MIN_S, asyncio.get_running_loop()
        while True:
            due = loop.time() + wait * random.uniform(0.8, 1.2)
            changed = False
            while not changed and loop.time() < due:
                await asyncio.sleep(POLL_S)
                try:
                    changed = await self._follow()
                except _TROUBLE as error:
                    log.warning("mDNS could not follow a change of interfaces (%s)", error)
            wait = REQUERY_MIN_S if changed else min(2 * wait, REQUERY_MAX_S)
            await self._ask()

    async def _follow(self) -> bool:
        """Bring zeroconf's sockets in line with the interfaces as they are now. True when something changed."""
        snapshot = nics.read(self._interfaces.keys())
        up = {nic.name for nic in snapshot if nic.up}
        current = [self._narrow(i) for i in nics.rank(snapshot) if i.name in up and i.addresses]
        choices = self._usable_choices(current)
        if choices == self._choices:
            return False
        self._choices, self._networks = choices, _networks(current)
        zeroconf: Any = self._zeroconf
        if hasattr(zeroconf, "async_update_interfaces"):  # zeroconf >= 0.150; re-announces by itself
            await asyncio.wait_for(zeroconf.async_update_interfaces(choices), 10)
        else:
            await self._shut()
        return True

    def _narrow(self, now: Interface) -> Interface:
        """An interface of which one address was named keeps to that one while it has it."""
        named = self._interfaces[now.name].addresses
        kept = tuple(a for a in now.addresses if a in named) or now.addresses
        return replace(now, addresses=kept)

    def _usable_choices(self, interfaces: Sequence[Interface]) -> list[str | int]:
        """What zeroconf is to join: IPv4 addresses, or the index of an IPv6 interface. A bad one is a warning."""
        choices: list[str | int] = []
        for interface in interfaces:
            v4 = [a for a in interface.addresses if ":" not in a]
            choice: str | int = v4[0] if v4 else interface.index
            try:
                join_group(choice).close()
            except OSError as error:
                if interface.name not in self._warned:
                    log.warning("mDNS leaves out interface %s: it cannot join multicast (%s)", interface.name, error)
                self._warned.add(interface.name)
            else:
                self._warned.discard(interface.name)
                choices.append(choice)
        return choices

    # ---- peers ----

    def _changed(self, zeroconf: object, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed or name == self._info.name or name in self._resolving:
            return
        if len(self._resolving) >= MAX_RESOLVING:
            return
        task = asyncio.create_task(self._resolve(name), name="mdns-resolve")
        self._resolving[name] = task
        task.add_done_callback(lambda _: self._resolving.pop(name, None))

    async def _resolve(self, name: str) -> None:
        if self._zeroconf is None:
            return
        info = AsyncServiceInfo(SERVICE, name)
        try:
            if not await info.async_request(self._zeroconf.zeroconf, RESOLVE_MS):
                return
            heard = read_announcement(info.decoded_properties, info.port, info.parsed_scoped_addresses())
        except _TROUBLE as error:  # what others send may be anything
            log.debug("mDNS: %s cannot be read (%s)", name, error)
            return
        if heard is not None and heard.cluster == self.local.cluster:
            self._judge(heard)

    def _judge(self, heard: Announcement) -> None:
        if why := refusal(heard, self.local.key):
            if (heard.id, heard.key) not in self._reported and len(self._reported) < MAX_REPORTED:
                self._reported.add((heard.id, heard.key))
                self._on_refused(Address(heard.addresses[0], heard.port), why)
            return
        for address in nearest(heard.addresses, self._networks):
            self._on_peer(Address(address, heard.port), heard.txt)


def join_group(choice: str | int) -> socket.socket:
    """A UDP socket that sends to and hears the mDNS group through one interface (IPv4 address, or index for IPv6).

    Not bound to the mDNS port. Raises OSError when the interface cannot do multicast.
    """
    family = socket.AF_INET if isinstance(choice, str) else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if isinstance(choice, str):
            here = socket.inet_aton(choice)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP4) + here)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
        else:
            group = socket.inet_pton(socket.AF_INET6, GROUP6)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + struct.pack("@I", choice))
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, choice)
    except OSError:
        sock.close()
        raise
    return sock


def _networks(interfaces: Sequence[Interface]) -> list[str]:
    return [network for interface in interfaces for network in interface.networks]


def _service_info(local: Announcement, before: AsyncServiceInfo | None = None) -> AsyncServiceInfo:
    """Under a name of its own, or under the one that it has already."""
    suffix = secrets.token_hex(4)
    cluster = "".join(c if c.isascii() and c.isalnum() else "-" for c in local.cluster)
    instance = f"{local.id}-{suffix}-{cluster}"[:_LABEL_MAX]
    return AsyncServiceInfo(
        SERVICE,
        before.name if before else f"{instance}.{SERVICE}",
        port=local.port,
        properties=local.txt,
        server=before.server if before else f"p2pdyn-{local.id}-{suffix}.local.",
        parsed_addresses=list(local.addresses),
    )
