"""Which interface a peer takes, over snapshots of hosts that people really have; then the reader on this host."""

from __future__ import annotations

import pytest

from p2pdyn.net.interfaces import (
    BOND,
    BRIDGE,
    LOOPBACK,
    PHYSICAL,
    TUNNEL,
    VIRTUAL,
    VLAN,
    WIRELESS,
    Nic,
    pick,
    rank,
    ranked,
    read,
)

LO = Nic("lo", 1, LOOPBACK, ("127.0.0.1/8", "::1/128"))


def nic(name: str, address: str = "", **more: object) -> Nic:
    return Nic(name, addresses=(address,) if address else (), **more)  # type: ignore[arg-type]


def usable(nics: list[Nic]) -> list[str]:
    return [i.name for i in rank(nics) if i.usable]


@pytest.mark.parametrize(
    ("nics", "expected"),
    [
        ([LO, nic("eno1", "10.0.0.5/24", speed=1000), nic("ens2", "10.1.0.5/24", speed=200000)], ["ens2", "eno1"]),
        ([nic("eth0", "8.8.4.4/24", speed=100000), nic("eth1", "192.168.1.2/24", speed=1000)], ["eth1", "eth0"]),
        ([nic("wlan0", "10.0.0.2/24", kind=WIRELESS), nic("eth0", "10.0.0.3/24")], ["eth0", "wlan0"]),
        ([nic("wg0", "10.9.0.1/24", kind=TUNNEL), nic("wlan0", "10.0.0.2/24", kind=WIRELESS)], ["wlan0", "wg0"]),
        ([nic("eth0", "10.0.0.3/24", up=False), nic("tun0", "10.8.0.1/24", kind=TUNNEL)], ["tun0"]),
        (
            [
                nic("bond0", "10.0.0.1/24", kind=BOND, speed=50000),
                nic("eth0", speed=25000, master="bond0"),
                nic("eth1", "10.0.0.9/24", speed=25000, master="bond0"),
                nic("mgmt", "10.2.0.1/24", speed=1000),
            ],
            ["bond0", "mgmt"],
        ),
        (
            [nic("eth0", "10.0.0.1/24", speed=10000), nic("eth0.7", "10.7.0.1/24", kind=VLAN, speed=10000)],
            ["eth0", "eth0.7"],
        ),
    ],
    ids=["faster", "private", "wired-over-wireless", "vpn-last", "down", "bond", "vlan"],
)
def test_order(nics: list[Nic], expected: list[str]) -> None:
    assert usable(nics) == expected


@pytest.mark.parametrize(
    "name",
    ["docker0", "br-0123456789ab", "cni0", "flannel.1", "virbr0", "veth1a2b", "lxcbr0", "kube-ipvs0", "cali1234"],
)
def test_container_networks_are_never_used(name: str) -> None:
    found = {i.name: i for i in rank([nic(name, "172.17.0.1/16", kind=VIRTUAL), nic("eth0", "10.0.0.1/24")])}
    assert found["eth0"].rank == 0
    assert not found[name].usable
    assert found[name].container


def test_a_bridge_of_containers_only_is_not_used_whatever_its_name() -> None:
    nics = [nic("lan", "10.5.0.1/24", kind=BRIDGE), nic("p0", kind=VIRTUAL, master="lan")]
    assert usable(nics) == []
    assert rank(nics)[0].container


def test_a_bridge_over_a_physical_port_is_the_host() -> None:
    nics = [nic("vmbr0", "10.5.0.1/24", kind=BRIDGE), nic("eno1", master="vmbr0"), nic("eno2", "10.6.0.1/24")]
    found = rank(nics)
    assert [i.name for i in found if i.usable] == ["eno2", "vmbr0"]
    assert "eno1" in found[1].why


def test_inside_a_container_the_veth_is_the_only_way_out() -> None:
    assert usable([LO, nic("eth0", "172.17.0.2/16", kind=VIRTUAL)]) == ["eth0"]


def test_a_bridge_port_with_an_ordinary_name_is_not_used() -> None:
    (port,) = rank([nic("h1", "10.0.0.1/24", kind=VIRTUAL, master="br0")])
    assert not port.usable
    assert "br0" in port.why


def test_addresses_private_ipv4_first_and_link_local_left_out() -> None:
    addresses = ("fe80::1/64", "2001:4860::5/64", "fd00::5/64", "169.254.3.4/16", "8.8.8.8/24", "10.0.0.5/24")
    (eth0,) = rank([Nic("eth0", 2, PHYSICAL, addresses)])
    assert eth0.addresses == ("10.0.0.5", "8.8.8.8", "fd00::5", "2001:4860::5")
    assert eth0.networks[0] == "10.0.0.0/24"
    (only_local,) = rank([Nic("eth0", 2, PHYSICAL, ("fe80::1/64",))])
    assert not only_local.usable
    assert "link-local" in only_local.why


def test_every_interface_gets_a_reason() -> None:
    nics = [LO, nic("a"), nic("b", "10.0.0.1/24"), nic("docker0", "172.17.0.1/16"), nic("c", "10.1.0.1/24", up=False)]
    found = rank(nics)
    assert len(found) == len(nics)
    assert all(i.why for i in found)


HOST = rank([LO, nic("eth0", "10.0.0.5/24", speed=1000), nic("eth1", "10.1.0.5/24", speed=9000), nic("down0")])


def test_pick_the_best_with_loopback() -> None:
    listen = pick(None, HOST)
    assert listen.hosts == ("10.1.0.5", "127.0.0.1")
    assert [i.name for i in listen.interfaces] == ["eth1"]


def test_pick_by_name_overrides_the_ranking() -> None:
    assert pick("eth0", HOST).hosts == ("10.0.0.5", "127.0.0.1")
    assert pick("lo", HOST).hosts == ("127.0.0.1",)


def test_pick_an_address_binds_it_alone() -> None:
    listen = pick("10.0.0.5", HOST)
    assert (listen.hosts, [i.name for i in listen.interfaces]) == (("10.0.0.5",), ["eth0"])
    assert pick("[::1]", HOST).host == "::1"
    assert pick("localhost", HOST).host == "127.0.0.1"


def test_pick_the_wildcard_names_every_usable_address() -> None:
    assert pick("0.0.0.0", HOST).hosts == ("10.1.0.5", "10.0.0.5", "127.0.0.1")


@pytest.mark.parametrize(
    ("listen", "interfaces", "words"),
    [
        ("eth9", HOST, "eth9 is neither an address nor an interface"),
        ("down0", HOST, "down0 has no address"),
        (None, rank([LO]), "--listen"),
        ("0.0.0.0", [], "--listen"),
    ],
)
def test_pick_refuses_with_the_mend(listen: str | None, interfaces: list[object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pick(listen, interfaces)  # type: ignore[arg-type]


def test_the_reader_sees_this_hosts_loopback() -> None:
    assert next(n for n in read() if n.name == "lo").kind == LOOPBACK
    assert all(i.rank == -1 for i in ranked() if i.name == "lo")
