"""Several engines in one cluster: the very files of examples/multinode/mixed, as they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from netns.examples import frontend, install
from netns.lab import Host, Lab, Node
from support.nodes import wait_for

from p2pdyn import __version__

JOIN_S = 10.0
TINY = {"P2PDYN_MODEL": "tiny"}
"""builtin's default model would have to be fetched."""
TWIN = {"P2PDYN_ENGINE": "support.twin_engine:create", "PYTHONPATH": str(Path(__file__).parents[1])}

ASK = """
import json, sys, urllib.request

url, headers = "http://127.0.0.1:8000/v1/completions", {"content-type": "application/json"}
for prompt in sys.argv[2:]:
    body = json.dumps({"model": sys.argv[1], "prompt": prompt, "max_tokens": 4, "temperature": 0}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as answer:
        print(*json.load(answer)["p2pdyn"]["workers"])
"""


def node(host: Host, file: str, **env: str) -> Node:
    return host.node("--config", f"{host.folder}/mixed/{file}.toml", env=env)


def served_by(host: Host, model: str) -> set[str]:
    """The workers that answer eight short prompts, given to the frontend on this host."""
    return set(host.run(sys.executable, "-c", ASK, model, *(f"{number} sheep" for number in range(8))).split())


def peer(seen_by: Node, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(p for p in seen_by.report()["peers"] if p["name"] == name)
    return found


def test_engines_of_all_kinds_in_one_cluster(lab: Lab) -> None:
    switch = lab.switch("10.20.1")
    hosts = a, b, c, d, e = [lab.host(name, switch, number) for number, name in enumerate("abcde", 1)]
    install("mixed", *hosts)
    nodes = entry, chat, code, twin = [
        frontend(a, "mixed"), node(b, "chat", **TINY), node(c, "code"), node(e, "code", **TWIN)
    ]  # fmt: skip
    for one in nodes:
        one.wait_ready()
    wait_for(lambda: entry.sees("b", "c", "e"), JOIN_S, lambda: f"all are ready: {entry.states()}")
    peers = entry.report()["peers"]
    assert {p["name"]: (p["engine"], p["models"]) for p in peers} == {
        "a": ("none", []),
        "b": ("builtin", ["chat"]),
        "c": ("sim", ["code"]),
        "e": ("twin", ["code"]),
    }
    assert {p["name"]: p["engine_version"] for p in peers} == {"a": "", "b": __version__, "c": __version__, "e": "2.1"}
    table = a.p2pdyn("peers", "--cluster-key", str(a.key))
    assert f" builtin {__version__}  chat " in table
    assert " twin 2.1 " in table

    # another engine under a name that is taken, which would answer otherwise
    other = node(d, "chat-too").wait_ready()
    wait_for(lambda: entry.states().get("d") == "incompatible", JOIN_S, lambda: f"d: {entry.states()}")
    detail = peer(entry, "d")["detail"]
    assert f"by {chat.id}, but with" in detail
    assert detail.endswith("contexts of 4096 and 32768 tokens")
    assert served_by(a, "chat") == {chat.id} != {other.id}

    # two engines that answer the same
    both = set[str]()
    wait_for(lambda: both.update(served_by(a, "code")) or both == {code.id, twin.id}, JOIN_S, lambda: f"both: {both}")
