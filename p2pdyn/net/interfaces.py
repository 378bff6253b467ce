"""Which network interface a peer listens on and announces: a thin reader of /sys and a pure ranking over what it read.

A host of a cluster has several: the data network, the management port, a VPN, and the bridges of its container runtime.
Announcing the wrong one is the classic failure of zero-configuration clusters, so every choice carries its reason.

- Wired first (physical, bond, VLAN, bridge over a physical port): private before public addresses, faster first.
- Then virtual ends (a container's own eth0), wireless, tunnels and VPNs.
- Never: loopback, link-local addresses, members of a bond or bridge, and the bridges and cables of container runtimes.
  Those are known by their name or by being a bridge without a physical port, not by being a veth: inside a container
  or a network namespace a veth is the only way out.
"""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import socket
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_IpInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

log = logging.getLogger(__name__)

SYS_NET = Path("/sys/class/net")

LOOPBACK, PHYSICAL, BOND, VLAN, BRIDGE = "loopback", "physical", "bond", "vlan", "bridge"
VIRTUAL, WIRELESS, TUNNEL = "virtual", "wireless", "tunnel"

_CLASS = {PHYSICAL: 0, BOND: 0, VLAN: 0, BRIDGE: 0, VIRTUAL: 1, WIRELESS: 2, TUNNEL: 3}
_TIE = {PHYSICAL: 0, BOND: 1, VLAN: 2, BRIDGE: 3}

_CONTAINER_PREFIXES = (
    "docker", "br-", "cni", "flannel", "virbr", "veth", "lxc", "lxd", "kube", "cali", "cilium", "weave", "podman",
    "nodelocaldns", "vxlan.calico", "tunl", "ovs-system", "nerdctl",
)  # fmt: skip
"""Names that container and VM runtimes give to the host's side of their networks."""

_SIOCGIFFLAGS = 0x8913
_IFF_UP, _IFF_LOOPBACK, _IFF_POINTOPOINT, _IFF_RUNNING = 0x1, 0x8, 0x10, 0x40
_ARPHRD_INFINIBAND = 32


@dataclass(frozen=True, slots=True)
class Nic:
    """What the system says of one interface. ``addresses`` are ``ip/prefix``; ``speed`` is Mbit/s, 0 when unknown."""

    name: str
    index: int = 0
    kind: str = PHYSICAL
    addresses: tuple[str, ...] = ()
    up: bool = True
    speed: int = 0
    master: str = ""


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface after ranking: ``rank`` 0 is the best, -1 means never to be used; ``why`` says so in words.

    ``addresses`` are the usable ones without prefix, best first; ``networks`` their ``network/prefix``, in step.
    """

    name: str
    index: int
    kind: str
    addresses: tuple[str, ...]
    networks: tuple[str, ...]
    rank: int
    why: str
    container: bool = False

    @property
    def usable(self) -> bool:
        return self.rank >= 0


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to bind. ``hosts[0]`` is the address to advertise; ``interfaces`` are the ones that mDNS speaks on."""

    hosts: tuple[str, ...]
    interfaces: tuple[Interface, ...]
    why: str

    @property
    def host(self) -> str:
        return self.hosts[0]


def rank(nics: Iterable[Nic]) -> list[Interface]:
    """Order a snapshot, best interface first; the ones never to be used come last, each with its reason."""
    nics = list(nics)
    good: list[tuple[tuple[int, bool, int, int, int, str], Interface]] = []
    bad: list[Interface] = []
    for nic in nics:
        container, reason = _objection(nic, nics)
        usable = _usable_addresses(nic)
        if not reason and not usable:
            reason = "has only link-local addresses" if nic.addresses else "has no address"
        if reason:
            bad.append(_interface(nic, usable, reason, container))
            continue
        private = usable[0].ip.is_private
        key = (_CLASS[nic.kind], not private, -nic.speed, _TIE.get(nic.kind, 9), nic.index, nic.name)
        good.append((key, _interface(nic, usable, _praise(nic, private, nics), False)))
    good.sort(key=lambda pair: pair[0])
    ordered = [replace(interface, rank=place) for place, (_, interface) in enumerate(good)]
    return ordered + sorted(bad, key=lambda interface: interface.name)


def ranked() -> list[Interface]:
    """This host's interfaces, best first (see :func:`rank`)."""
    return rank(read())


def pick(listen: str | None, interfaces: Sequence[Interface] | None = None) -> Listen:
    """Resolve ``--listen``: None (the best interface), an interface's name, an address, or 0.0.0.0 / :: (all usable).

    A named interface, and the default, also listen on loopback, so that `p2pdyn peers` on the same host finds its peer.
    Raises ValueError with the mend when nothing fits.
    """
    found = ranked() if interfaces is None else list(interfaces)
    usable = [i for i in found if i.usable]
    if listen is None or listen in ("0.0.0.0", "::", "*"):
        if not usable:
            reasons = "; ".join(f"{i.name} {i.why}" for i in found) or "there is none"
            raise ValueError(f"no network interface is fit to listen on ({reasons}): name an address with --listen")
        chosen = usable[:1] if listen is None else usable
        hosts = tuple(i.addresses[0] for i in chosen)
        why = f"{chosen[0].name}: {chosen[0].why}" if listen is None else "every usable interface"
        return Listen((*hosts, _loopback(hosts[0])), tuple(chosen), why)
    try:
        address = ipaddress.ip_address("127.0.0.1" if listen == "localhost" else listen.strip("[]"))
    except ValueError:
        return _pick_named(listen, found)
    host = str(address)
    on = tuple(_only(i, host) for i in found if host in i.addresses)
    return Listen((host,), on, "named with --listen")


def _pick_named(name: str, found: Sequence[Interface]) -> Listen:
    """The interface called ``name``, whatever its rank: a name given by hand overrides the ranking."""
    for interface in found:
        if interface.name == name:
            if not interface.addresses:
                raise ValueError(f"interface {name} {interface.why}: give it an address or name another with --listen")
            host = interface.addresses[0]
            return Listen((host, _loopback(host)) if host != _loopback(host) else (host,), (interface,), "named")
    names = ", ".join(i.name for i in found if i.usable) or "none usable"
    raise ValueError(f"--listen {name} is neither an address nor an interface of this host (it has: {names})")


def _loopback(host: str) -> str:
    return "::1" if ":" in host else "127.0.0.1"


def _only(interface: Interface, host: str) -> Interface:
    network = interface.networks[interface.addresses.index(host)]
    return replace(interface, addresses=(host,), networks=(network,), why="named with --listen")


def _interface(nic: Nic, usable: Sequence[_IpInterface], why: str, container: bool) -> Interface:
    addresses, networks = tuple(str(a.ip) for a in usable), tuple(str(a.network) for a in usable)
    return Interface(nic.name, nic.index, nic.kind, addresses, networks, -1, why, container)


def _usable_addresses(nic: Nic) -> list[_IpInterface]:
    """Private IPv4, other IPv4, then IPv6 in the same order; link-local and the like left out (loopback only on lo)."""
    parsed = [ipaddress.ip_interface(text) for text in nic.addresses]
    fit = [a for a in parsed if not (a.ip.is_link_local or a.ip.is_multicast or a.ip.is_unspecified)]
    return sorted(fit, key=lambda a: (a.version, not a.ip.is_private))


def _objection(nic: Nic, nics: Sequence[Nic]) -> tuple[bool, str]:
    """(belongs to a container runtime, why the interface must not be used; empty when it may be)."""
    if nic.kind == LOOPBACK:
        return False, "is loopback: other hosts cannot reach it"
    if nic.name.startswith(_CONTAINER_PREFIXES):
        return True, "belongs to a container or VM runtime by its name: other hosts cannot reach it"
    if nic.kind == BRIDGE and not _ports(nic, nics):
        return True, "is a bridge without a physical port: only this host's containers are behind it"
    if nic.master:
        return False, f"is a member of {nic.master}"
    return False, "" if nic.up else "is down"


def _ports(bridge: Nic, nics: Sequence[Nic]) -> list[str]:
    return [n.name for n in nics if n.master == bridge.name and n.kind in (PHYSICAL, BOND, VLAN)]


def _praise(nic: Nic, private: bool, nics: Sequence[Nic]) -> str:
    kind = f"bridge over {', '.join(_ports(nic, nics))}" if nic.kind == BRIDGE else nic.kind
    speed = f", {nic.speed / 1000:g} Gbit/s" if nic.speed else ""
    return f"{kind}, up, {'private' if private else 'public'} address{speed}"


# ---- the reader ----


def read(only: Collection[str] | None = None) -> list[Nic]:
    """Snapshot of this host's interfaces, or of those named. One that cannot be read is logged and left out.

    Names, flags and addresses come from system calls, which see the process's own network namespace; /sys may show
    another one (`unshare -n` does not remount it), so an entry there counts only when its index matches.
    """
    import ifaddr  # brings ctypes; only a node that looks at interfaces pays for it

    addresses: dict[str, list[str]] = {}
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            # An alias such as eth0:1 is an address of eth0.
            addresses.setdefault(str(adapter.name).partition(":")[0], []).append(f"{text}/{ip.network_prefix}")
    nics = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for index, name in socket.if_nameindex():
            if only is not None and name not in only:
                continue
            try:
                nics.append(_read_one(name, index, tuple(addresses.get(name, ())), sock))
            except (OSError, ValueError) as error:
                log.warning("interface %s could not be read and is left out: %s", name, error)
    return nics


def _read_one(name: str, index: int, addresses: tuple[str, ...], sock: socket.socket) -> Nic:
    request = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH14x", name.encode()[:15], 0))
    flags = struct.unpack("16sH14x", request)[1]
    folder = SYS_NET / name
    if _text(folder / "ifindex") != str(index):
        folder = Path("/nonexistent")
    speed = _text(folder / "speed")  # -1 when unknown; EINVAL, so empty, while the link is down
    master = folder / "master"
    return Nic(
        name=name,
        index=index,
        kind=_kind(folder, flags),
        addresses=addresses,
        up=bool(flags & _IFF_UP and flags & _IFF_RUNNING),
        speed=int(speed) if speed.isdigit() else 0,
        master=master.resolve().name if master.is_symlink() else "",
    )


def _kind(folder: Path, flags: int) -> str:
    if flags & _IFF_LOOPBACK:
        return LOOPBACK
    devtype = next((x[8:] for x in _text(folder / "uevent").splitlines() if x.startswith("DEVTYPE=")), "")
    if (folder / "bridge").is_dir():
        return BRIDGE
    if (folder / "bonding").is_dir() or devtype in ("bond", "team"):
        return BOND
    if (folder / "wireless").is_dir() or (folder / "phy80211").exists() or devtype == "wlan":
        return WIRELESS
    tunnel = devtype in ("wireguard", "vxlan", "geneve", "ppp") or (folder / "tun_flags").exists()
    if tunnel or flags & _IFF_POINTOPOINT:
        return TUNNEL
    if devtype == "vlan":
        return VLAN
    physical = (folder / "device").exists() or _text(folder / "type") == str(_ARPHRD_INFINIBAND)
    return PHYSICAL if physical else VIRTUAL


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
