"""No cluster key and no API key anywhere but in its own file: with everything logged, after all that touches keys."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.nodes import Cluster, NodeProcess, make_key, wait_for
from support.zmtp import call

from p2pdyn.config import load
from p2pdyn.http.keys import ApiKeys
from p2pdyn.net.curve import Security

API_KEYS = ("sk-first-secret-of-clients-0001", "sk-second-secret-of-clients-002")
WRONG_KEY = "sk-a-guess-that-is-nobodys-secret"


def spellings(key: Path) -> list[str]:
    """Every way in which the cluster keys could be written: hex as in the file, Z85 as ZeroMQ takes them, raw."""
    found = re.findall(r"^p2pdyn-cluster-key-1 (\w+)$", key.read_text(), re.MULTILINE)
    for pair in Security.load(key).keys:
        found += [pair.secret.decode(), pair.public.decode()]
    return found


class Secret:
    """The cluster of one test and all that it ever printed."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.key = cluster.key = make_key(folder)
        self.api_keys = folder / "api.keys"
        self.api_keys.write_text("\n".join(API_KEYS) + "\n")
        debug = ("--log-level", "debug")
        self.frontend = cluster.frontend("f", "--api-key-file", str(self.api_keys), *debug)
        workers = ("--workers", "2", "--http", "127.0.0.1:0", *debug)
        self.parent = cluster.start("s", *workers, "--", "--speedup", "0", seeds=[self.frontend]).wait_ready()
        self.nodes: list[NodeProcess] = [self.frontend, self.parent]

    def ask(self, path: str, key: str, body: bytes | None = None) -> str:
        request = urllib.request.Request(self.frontend.url + path, body, {"Authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return str(answer.headers) + answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return f"{error.code} {error.headers} {error.read().decode()}"

    def processes(self) -> list[psutil.Process]:
        own = [psutil.Process(node.process.pid) for node in self.nodes]
        return own + [child for one in own for child in one.children(recursive=True)]


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Secret]:
    with Cluster(tmp_path) as nodes:
        yield Secret(tmp_path, nodes)


def test_no_secret_is_told_anywhere(secret: Secret) -> None:
    hidden = [*spellings(secret.key), *API_KEYS]
    told: list[str] = []
    # Good and bad clients, and clients of other keys.
    body = b'{"model": "sim", "prompt": "x", "max_tokens": 2}'
    wait_for(lambda: '"usage"' in secret.ask("/v1/completions", API_KEYS[1], body), 20, "an answer")
    for path in ("/v1/models", "/metrics", "/p2p/peers", "/nothing", f"/v1/models/{'m' * 200}"):
        told += [secret.ask(path, key) for key in (*API_KEYS, WRONG_KEY)]
    host, _, port = secret.frontend.mesh.rpartition(":")
    pair = Security.load(secret.key).keys[0]
    assert not call((host, int(port)), None, None, 0.3)
    assert call((host, int(port)), pair, pair)
    # A rotation, and files that cannot be used.
    subprocess.run([sys.executable, "-m", "p2pdyn", "keygen", "--add", str(secret.key)], check=True)
    hidden += spellings(secret.key)
    for node, peers in ((secret.frontend, 1), (secret.parent, 3)):  # a supervisor tells its workers
        node.signal(signal.SIGHUP)
        wait_for(
            lambda node=node, peers=peers: node.stderr.count("cluster key: read again") >= peers,
            10,
            "the added key is taken",
        )
    good = secret.key.read_text()
    secret.key.write_text(good.replace("p2pdyn-cluster-key-1 ", "p2pdyn-cluster-key-9 "))
    secret.api_keys.write_text(API_KEYS[0][:5])
    secret.frontend.signal(signal.SIGHUP)
    wait_for(lambda: secret.frontend.stderr.count("not read again") == 2, 10, "both files are refused")
    secret.key.write_text(good)
    told += [str(secret.frontend.peers(secret.key))]
    for command in (["peers", "--at", secret.frontend.mesh], ["peers", "--at", secret.frontend.mesh, "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "p2pdyn", *command, "--cluster-key", str(secret.key)],
            capture_output=True, text=True, timeout=40, check=False,
        )  # fmt: skip
        told += [done.stdout, done.stderr]
    # What ps shows, the environment that children get, and the logs at debug level.
    processes = secret.processes()
    assert len(processes) >= 4
    told += [str(process.cmdline()) + str(process.environ()) for process in processes]
    told += [node.stderr + "\n".join(node.lines) for node in secret.nodes]
    for hide in hidden:
        assert not [text for text in told if hide in text], f"{hide[:6]}... is told"
    assert not [text for text in told if WRONG_KEY in text], "a client's wrong key, perhaps right elsewhere, is told"


def test_a_repr_in_a_traceback_or_a_dump_tells_no_secret(tmp_path: Path) -> None:
    key, api_keys = make_key(tmp_path), tmp_path / "keys"
    api_keys.write_text(API_KEYS[0])
    config = load({"cluster_key": str(key), "api_key_file": str(api_keys), "data_dir": str(tmp_path / "d")}, {})
    security, keys = Security.load(key), ApiKeys(api_keys)
    shown = repr(config) + repr(security) + repr(security.keys) + repr(keys) + repr(vars(keys))
    assert not [hide for hide in (*spellings(key), API_KEYS[0]) if hide in shown]
