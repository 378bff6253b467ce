"""API keys: one a line, several at once, so that one can be replaced without a gap."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

MIN_KEY = 8
"""Characters: shorter ones are more likely a slip than a key."""


class ApiKeys:
    """None of the keys is kept: what is presented is hashed and compared with every hash, in constant time."""

    def __init__(self, file: Path | None) -> None:
        """Raises ValueError with the mend; OSError if the file cannot be read."""
        self._file = file
        self._digests: tuple[bytes, ...] = ()
        self.reload()

    @property
    def required(self) -> bool:
        return self._file is not None

    def reload(self) -> None:
        """Read the file again; the old keys stay when it is unusable."""
        if self._file is None:
            return
        try:
            text = self._file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"API key file {self._file} is not UTF-8 text ({error.reason}): mend it") from error
        lines = [line.strip() for line in text.splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"API key file {self._file} holds no key: write one key a line")
        if min(map(len, keys)) < MIN_KEY:
            raise ValueError(
                f"API key file {self._file} holds a key shorter than {MIN_KEY} characters: use longer ones"
            )
        self._digests = tuple(_digest(key.encode()) for key in keys)

    def accept(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header carries one of the keys (``Bearer KEY``), or none is needed."""
        if self._file is None:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        presented = _digest(key.strip())
        matches = [hmac.compare_digest(presented, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == b"bearer"


def presented(authorization: bytes | None) -> str:
    """A name for the key of an Authorization header that has been accepted, which does not tell the key."""
    return _digest((authorization or b"").partition(b" ")[2].strip())[:8].hex()


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=32).digest()
