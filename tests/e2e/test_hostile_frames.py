"""Garbage on every ZeroMQ port of a running cluster: nothing else is disturbed, nothing grows."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil
import pytest
import zmq
from support.nodes import Cluster, NodeProcess, make_key, wait_for

from p2pdyn.constants import PROTOCOL_VERSION
from p2pdyn.net.curve import Security
from p2pdyn.wire.codec import encode
from p2pdyn.wire.header import Header
from p2pdyn.wire.requests import Cancel, Fetch, Generate, Hello

ROUNDS = 400
GROWTH_MB = 24


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, make_key(tmp_path)) as nodes:
        yield nodes


def ports_of(node: NodeProcess) -> list[int]:
    """Every TCP port that the process listens on but its HTTP one."""
    http = int(node.url.rsplit(":", 1)[1]) if node.url != "off" else 0
    listening = psutil.Process(node.process.pid).net_connections("tcp")
    return sorted({c.laddr.port for c in listening if c.status == psutil.CONN_LISTEN} - {http})


def resident_mb(node: NodeProcess) -> float:
    return float(psutil.Process(node.process.pid).memory_info().rss) / 2**20


def raw_garbage(port: int, rng: random.Random) -> None:
    """Bytes that are no ZMTP, ZMTP greetings cut short, and a greeting for the wrong mechanism."""
    greeting = b"\xff" + b"\0" * 8 + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" * 32
    for data in (rng.randbytes(2000), b"GET / HTTP/1.1\r\n\r\n", greeting[: rng.randrange(64)], greeting, b""):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(data)


def member_garbage(rng: random.Random) -> Iterator[list[bytes]]:
    """What a member with the right key may send: noise, cut and mutated messages, future versions, odd frame counts."""
    header = encode(Header("default", "f" * 16, 1, 0))
    real = [
        encode(Hello("f" * 16, 1)),
        encode(Generate(1, 0, 1, "sim", 1, b"\1\0\0\0", b"")),
        encode(Cancel(((1, 0),))),
        encode(Fetch(1, "card", "0" * 32, 0)),
        header,
    ]
    for _ in range(ROUNDS):
        message = bytearray(rng.choice(real))
        message[rng.randrange(len(message))] = rng.randrange(256)
        yield [bytes(message)]
        yield [header, bytes(message)]
        yield [rng.choice(real)[: rng.randrange(1, 12)]]
        yield [rng.randbytes(rng.randrange(1, 600))]
        yield [header, bytes([PROTOCOL_VERSION + 1]) + rng.randbytes(30)]
        yield [rng.randbytes(8) for _ in range(rng.randrange(1, 12))]


def send_as_member(key: Path, ports: list[int], rng: random.Random) -> None:
    """With the right key, as a DEALER and as an XSUB: one of them is what the port's socket does not talk to at all."""
    keys = Security.load(key).keys[0]
    with zmq.Context() as context:
        for port in ports:
            for kind in (zmq.DEALER, zmq.XSUB):
                with context.socket(kind) as peer:
                    peer.linger = 1000
                    peer.curve_serverkey, peer.curve_publickey, peer.curve_secretkey = (
                        keys.public,
                        keys.public,
                        keys.secret,
                    )
                    peer.connect(f"tcp://127.0.0.1:{port}")
                    if peer.poll(500, zmq.POLLOUT):
                        for frames in member_garbage(rng):
                            with contextlib.suppress(zmq.Again):
                                peer.send_multipart(frames, zmq.DONTWAIT)


def test_garbage_disturbs_nobody(cluster: Cluster) -> None:
    frontend = cluster.frontend("f1")
    workers = [cluster.worker(f"w{i}", seeds=[frontend]) for i in (1, 2)]
    nodes = [frontend, *workers]
    rng = random.Random(7)

    def answer() -> str:
        with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", timeout=20, max_retries=0) as client:
            done = client.chat.completions.create(
                model="sim", messages=[{"role": "user", "content": "still there?"}], max_tokens=16, temperature=0
            )
        return done.choices[0].message.content or ""

    def ready() -> bool:
        report = frontend.peers(*cluster.key_args())
        return [peer["state"] for peer in report["peers"]] == ["ready"] * 3

    wait_for(ready, 10, "three ready peers")
    before = answer()
    attack = _attack(nodes, cluster, rng)
    attack()
    memory = [resident_mb(node) for node in nodes]
    assert answer() == before
    for _ in range(3):
        attack()
        assert answer() == before
    assert ready()
    assert all(node.process.poll() is None for node in nodes)
    counted = dropped(frontend)
    assert counted["bad-message"] > ROUNDS, "the garbage did not arrive"
    assert counted["future-version"] > ROUNDS
    assert counted.get("bad-handshake", 0) + counted.get("abandoned-handshake", 0) > 0
    growth = [resident_mb(node) - had for node, had in zip(nodes, memory, strict=True)]
    assert max(growth) < GROWTH_MB, growth
    assert not any("Traceback" in node.stderr for node in nodes)


def dropped(node: NodeProcess) -> dict[str, float]:
    """What the control link has counted, by reason."""
    with urllib.request.urlopen(f"{node.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {kind: float(count) for kind, count in re.findall(r'mesh_events_total{event="([\w-]+)"} (\S+)', text)}


def _attack(nodes: list[NodeProcess], cluster: Cluster, rng: random.Random) -> Callable[[], None]:
    assert cluster.key is not None
    key = cluster.key
    ports = [port for node in nodes for port in ports_of(node)]
    assert len(ports) == 1 + 3 + 3  # control; control, requests, events of each worker

    def attack() -> None:
        for port in ports:
            raw_garbage(port, rng)
        send_as_member(key, ports, rng)

    return attack
