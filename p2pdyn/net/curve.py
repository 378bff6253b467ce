"""The cluster key: one or two CURVE keypairs that all peers of a cluster share (RFC 26/CurveZMQ).

A key file has one line a keypair, ``p2pdyn-cluster-key-1 <64 hex digits of the secret key>``; lines that start with
``#`` are comments.  The first keypair is the one that this peer serves with; clients of any of them are let in, and a
peer that connects tries each in turn, as server key and as its own.  So a key is rotated by giving every node first
[old, new], then [new, old], then [new], one node after the other.  The key proves membership, not which member.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from p2pdyn.core.types import Address

_TAG = "p2pdyn-cluster-key-1"
_HEADER = (
    "# The cluster key of p2pdyn. Whoever has this file is a member: copy it to each host, keep it secret.\n"
    "# Nodes serve with the first key and let in every one; `p2pdyn keygen --help` says how to replace it.\n"
)
MAX_KEYS = 2


class KeyFileError(ValueError):
    """A cluster key file that cannot be used; the message is one sentence with the mend."""


@dataclass(frozen=True, slots=True)
class Keypair:
    """Both in Z85, 40 bytes, as ZeroMQ takes them. The public key is kept as secret as the secret one."""

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the key without telling it."""
        return hashlib.blake2b(self.public, digest_size=8, person=b"p2pdyn-key").hexdigest()


@dataclass(frozen=True, slots=True)
class Security:
    """How this peer's sockets are protected. Without keys only loopback is bound, unless ``allow_remote``."""

    keys: tuple[Keypair, ...] = ()
    allow_remote: bool = False

    @classmethod
    def insecure(cls, allow_remote: bool = False) -> Security:
        """No key: anybody who reaches a port is let in."""
        return cls((), allow_remote)

    @classmethod
    def load(cls, path: Path | str) -> Security:
        """Read a key file. Raises KeyFileError."""
        return cls(_read_key_file(Path(path)))

    @property
    def fingerprint(self) -> str:
        """Of all keys, comma-separated, the serving one first; empty without a key. Safe to announce."""
        return ",".join(key.fingerprint for key in self.keys)

    def check_bind(self, address: Address) -> None:
        """Raises PermissionError with the sentence for the user if this address must not be bound."""
        if not self.keys and not self.allow_remote and not address.is_loopback:
            raise PermissionError(
                f"refusing to listen on {address} without a cluster key: give --cluster-key FILE "
                "(make one with `p2pdyn keygen FILE`), or --insecure to let anybody in"
            )


def write_key_file(path: Path | str) -> str:
    """Make a new key file with one keypair, mode 0600, and return its fingerprint. Raises KeyFileError."""
    key = _new_key()
    try:
        _create(Path(path), (key,))
    except FileExistsError:
        raise KeyFileError(f"{path} exists already: remove it first, or choose another name") from None
    except OSError as error:
        raise KeyFileError(f"cannot write the cluster key file {path}: {error.strerror}") from None
    return key.fingerprint


ADD, SWAP, DROP = "add", "swap", "drop"
"""The steps of a rotation: [old] to [old, new], to [new, old], to [new]."""


def rotate_key_file(path: Path | str, step: str) -> Security:
    """Take the file one ``step`` further, in one piece, and return what it holds then. Raises KeyFileError."""
    path = Path(path)
    keys = _read_key_file(path)
    if step == ADD and len(keys) == MAX_KEYS:
        raise KeyFileError(f"{path} holds two keys already: finish that rotation with --swap and --drop first")
    if step != ADD and len(keys) < MAX_KEYS:
        raise KeyFileError(f"{path} holds one key: a rotation begins with --add")
    keys = {ADD: (*keys, _new_key()), SWAP: keys[::-1], DROP: keys[:1]}[step]
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            _create(fresh, keys)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise KeyFileError(f"cannot write the cluster key file {path}: {error.strerror}") from None
    return Security(keys)


def _new_key() -> Keypair:
    return Keypair(*zmq.curve_keypair())


def _create(path: Path, keys: Sequence[Keypair]) -> None:
    """A new file that only its owner can read, from its first byte on, and that outlives a loss of power."""
    lines = "".join([f"{_TAG} {_z85_to_hex(key.secret)}\n" for key in keys])
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(_HEADER + lines)
        file.flush()
        os.fsync(file.fileno())


def _read_key_file(path: Path) -> tuple[Keypair, ...]:
    try:
        with path.open(encoding="ascii") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KeyFileError(f"the cluster key file {path} is open to other users: run `chmod 600 {path}`")
            text = file.read(4096)
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} is not a cluster key file: make one with `p2pdyn keygen FILE`") from None
    except OSError as error:
        raise KeyFileError(f"cannot read the cluster key file {path}: {error.strerror}") from None
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not 1 <= len(lines) <= MAX_KEYS:
        raise KeyFileError(
            f"{path} holds {len(lines)} keys where one or two belong: make one with `p2pdyn keygen FILE`"
        )
    keys = tuple([_parse_line(words, path) for words in lines])
    if len(set(keys)) != len(keys):
        raise KeyFileError(f"{path} holds the same key twice: remove one line")
    return keys


def _parse_line(words: list[str], path: Path) -> Keypair:
    try:
        tag, digits = words
        raw = bytes.fromhex(digits)
    except ValueError:
        tag, raw = "", b""
    if tag != _TAG or len(raw) != 32:
        raise KeyFileError(f"{path} has a line that is no cluster key: make a new file with `p2pdyn keygen FILE`")
    secret = _raw_to_z85(raw)
    return Keypair(zmq.curve_public(secret), secret)


def _raw_to_z85(raw: bytes) -> bytes:
    text: bytes = z85.encode(raw)
    return text


def _z85_to_hex(text: bytes) -> str:
    return str(z85.decode(text).hex())


def raw_public(key: Keypair) -> bytes:
    """The 32 bytes that ZAP hands over as a client's credentials."""
    return bytes.fromhex(_z85_to_hex(key.public))
