"""The hostile inputs at the ZeroMQ ports: strangers without the key, and members that send what no peer sends."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import zmq

from p2pdyn.constants import PROTOCOL_VERSION
from p2pdyn.net.curve import Keypair
from p2pdyn.wire.codec import encode
from p2pdyn.wire.header import Header
from p2pdyn.wire.requests import Cancel, Fetch, Generate, Hello
from support.hostile import Case, Target
from support.zmtp import HANDSHAKES, call, greeting, knock, record_handshake

ROUNDS = 400


def at_each_port(attack: Callable[[tuple[str, int]], str]) -> Callable[[Target], str]:
    """At all ports side by side: the answer of all if it is one, else each port's."""

    def run(target: Target) -> str:
        with ThreadPoolExecutor(len(target.ports)) as pool:
            found = pool.map(attack, [(target.host, port) for port in target.ports.values()])
            answers = dict(zip(target.ports, found, strict=True))
        return answers.popitem()[1] if len(set(answers.values())) == 1 else str(answers)

    return run


def _stranger(target: Target, server: Keypair | None, own: Keypair | None) -> str:
    return at_each_port(lambda where: "let in" if call(where, server, own, 0.3) else "not let in")(target)


def strangers() -> Iterator[Case]:
    for name, data in HANDSHAKES.items():
        yield Case("no key", name, at_each_port(lambda where, data=data: knock(where, data())), "closed")  # type: ignore[misc]
    other = Keypair(*zmq.curve_keypair())
    for name, known, own in (
        ("a real client without CURVE", False, None),
        ("a real client with another key", None, other),
        ("a real client that knows the server's public key only", True, other),
    ):

        def attack(target: Target, known: bool | None = known, own: Keypair | None = own) -> str:
            return _stranger(target, target.key if known else own, own)

        yield Case("no key", name, attack, "not let in")
    yield Case("no key", "a member's whole connection, recorded and replayed", _replay, "closed")
    yield Case("no key", "half a greeting, held open", _held(greeting()[:20]), "closed after 5 s", slow=True)
    yield Case("no key", "a greeting and silence", _held(greeting()), "closed after 5 s", slow=True)
    yield Case("no key", "a connection that says nothing", _held(b""), "closed after 5 s", slow=True)
    yield Case("no key", "a greeting, a byte each second", _drip, "closed after 5 s", slow=True)
    yield Case("no key", "2,000 connections that say nothing, to each port", _crowd, "closed")


def _replay(target: Target) -> str:
    def attack(where: tuple[str, int]) -> str:
        message = [encode(Header("default", "f" * 16, 1, 0)), encode(Hello("f" * 16, 1))]
        return knock(where, record_handshake(where, target.key, message))

    return at_each_port(attack)(target)


def _held(data: bytes) -> Callable[[Target], str]:
    def attack(where: tuple[str, int]) -> str:
        began = time.monotonic()
        end = knock(where, data, 20)
        return f"{end} after {5 if 4 < time.monotonic() - began < 12 else time.monotonic() - began:.0f} s"

    # Another port for each: they need not wait for one another.
    return lambda target: attack((target.host, target.ports[sorted(target.ports)[len(data) % len(target.ports)]]))


def _drip(target: Target) -> str:
    began = time.monotonic()
    with socket.create_connection((target.host, min(target.ports.values())), timeout=20) as one:
        one.settimeout(1.0)
        for byte in greeting():
            try:
                one.send(bytes([byte]))
                if not one.recv(4096):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    took = time.monotonic() - began
    return f"closed after {5 if 4 < took < 12 else took:.0f} s"


def _crowd(target: Target) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        return at_each_port(partial(_crowd_at, int(2000 * target.scale)))(target)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _crowd_at(size: int, where: tuple[str, int]) -> str:
    crowd = []
    with contextlib.ExitStack() as stack:
        for _ in range(size):
            with contextlib.suppress(OSError):
                crowd.append(stack.enter_context(socket.create_connection(where, timeout=10)))
        for one in crowd:
            with contextlib.suppress(ConnectionError):
                while one.recv(4096):  # a timeout is no ConnectionError, and says that it was not closed
                    pass
    return "closed"


def member_garbage(rng: random.Random, rounds: int) -> Iterator[list[bytes]]:
    """What a member with the right key may send: noise, cut and mutated messages, odd frame counts."""
    header = encode(Header("default", "f" * 16, 1, 0))
    real = [
        encode(Hello("f" * 16, 1)),
        encode(Generate(1, 0, 1, "sim", 1, b"\1\0\0\0", b"")),
        encode(Cancel(((1, 0),))),
        encode(Fetch(1, "card", "0" * 32, 0)),
        header,
    ]
    for _ in range(rounds):
        message = bytearray(rng.choice(real))
        message[rng.randrange(len(message))] = rng.randrange(256)
        yield [bytes(message)]
        yield [header, bytes(message)]
        yield [rng.choice(real)[: rng.randrange(1, 12)]]
        yield [rng.randbytes(rng.randrange(1, 600))]
        yield [rng.randbytes(8) for _ in range(rng.randrange(1, 12))]


def future_versions(rng: random.Random, rounds: int) -> Iterator[list[bytes]]:
    header = encode(Header("default", "f" * 16, 1, 0))
    for _ in range(rounds):
        yield [header, bytes([PROTOCOL_VERSION + 1]) + rng.randbytes(30)]
        yield [bytes([PROTOCOL_VERSION + 1]) + rng.randbytes(30)]


def say_as_member(target: Target, messages: Callable[[int], Iterator[list[bytes]]]) -> str:
    """With the right key, as a DEALER and as an XSUB: one of them is what the port's socket does not talk to at all."""
    key, rounds = target.key, max(int(ROUNDS * target.scale), 20)

    def say(where: tuple[str, int]) -> str:
        sent = 0
        with zmq.Context() as context:
            for kind in (zmq.DEALER, zmq.XSUB):
                with context.socket(kind) as peer:
                    peer.linger = 1000
                    peer.curve_serverkey = peer.curve_publickey = key.public
                    peer.curve_secretkey = key.secret
                    peer.connect(f"tcp://{where[0]}:{where[1]}")
                    if peer.poll(500, zmq.POLLOUT):
                        for frames in messages(rounds):
                            with contextlib.suppress(zmq.Again):
                                peer.send_multipart(frames, zmq.DONTWAIT)
                                sent += 1
        return "sent" if sent else "nothing could be sent"

    return at_each_port(say)(target)


def members() -> Iterator[Case]:
    large = [[bytes(24 * 2**20)]]
    many = [[b""] * 10_000]
    for name, messages in (
        ("garbage, cut and mutated messages", lambda rounds: member_garbage(random.Random(7), rounds)),
        ("messages from a future protocol version", lambda rounds: future_versions(random.Random(7), rounds)),
        ("a message of 24 MB", lambda _: iter(large)),
        ("a message of 10,000 frames", lambda _: iter(many)),
    ):
        yield Case("members", name, partial(say_as_member, messages=messages), "sent")


def cases() -> Iterator[Case]:
    yield from strangers()
    yield from members()
