"""Hosts that run the files of examples/multinode as its README says; only the engine is the simulated one."""

from __future__ import annotations

import shutil
from pathlib import Path

from netns.lab import Host, Lab, Node

EXAMPLES = Path(__file__).parents[2] / "examples" / "multinode"
SIM = {"P2PDYN_ENGINE": "sim", "P2PDYN_ENGINE_ARGS": "--speedup 0"}


def install(example: str, *hosts: Host) -> None:
    """What the README says: one key, and the folder with it copied to every host."""
    first, *others = hosts
    shutil.copytree(EXAMPLES / example, first.folder / example)
    first.key = first.folder / example / "cluster.key"
    first.p2pdyn("keygen", str(first.key))
    for host in others:
        shutil.copytree(first.folder / example, host.folder / example)
        host.key = host.folder / example / "cluster.key"


def frontend(host: Host, example: str) -> Node:
    return host.node("--config", f"{host.folder}/{example}/frontend.toml")


def worker(host: Host, example: str, file: str = "worker", arguments: str = "--speedup 0") -> Node:
    env = {"P2PDYN_ENGINE": "sim", "P2PDYN_ENGINE_ARGS": arguments}
    return host.node("--config", f"{host.folder}/{example}/{file}.toml", env=env)


def three_hosts(lab: Lab) -> tuple[Host, Host, Host]:
    switch = lab.switch("10.20.1")
    return lab.host("a", switch, 1), lab.host("b", switch, 2), lab.host("c", switch, 3)
