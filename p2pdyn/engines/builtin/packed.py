"""Unpacked weights as a file that every worker of the host maps: written once, read at page boundaries.

Layout: magic, index offset and length; tensors, each page-aligned; model card; index as JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import IO

import numpy as np

from p2pdyn.engines.builtin.model import LlamaConfig
from p2pdyn.engines.builtin.tiles import F32

MAGIC = b"p2pdyn02"
"""First bytes of a packed file; the last two are its format's version."""
ALIGN = 4096
HEADER = 24
MAX_INDEX = 16 * 2**20
OURS = re.compile(r"(.+-[0-9a-f]{16})\.(?:packed|part)")


@dataclass(frozen=True, slots=True)
class Packed:
    """A model in the form that is computed with. ``card`` is the packed model card; ``weights`` the :func:`digest` of
    the file that all of it is from."""

    config: LlamaConfig
    card: bytes
    tensors: Mapping[str, F32]
    weights: str


@dataclass(frozen=True, slots=True)
class Source:
    """The GGUF file that a packed file is made of: its real path, size in bytes and time of change in ns."""

    path: str
    size: int
    time: int

    @classmethod
    def of(cls, path: Path) -> Source:
        """Raises OSError."""
        stat = path.stat()
        return cls(os.path.realpath(path), stat.st_size, stat.st_mtime_ns)


def place(path: Path, cache: Path) -> Path:
    """Where the packed file of a GGUF file is kept: named after its source and our format."""
    source = Source.of(path)
    what = f"{source.path}\0{source.size}\0{source.time}\0{MAGIC.decode()}"
    return cache / f"{path.stem}-{blake2b(what.encode(), digest_size=8).hexdigest()}.packed"


def digest(path: Path) -> str:
    """32 hex digits over a file's bytes: whether two workers have the same weights. 1 GB takes 1 to 2 s."""
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def write(
    file: IO[bytes],
    config: LlamaConfig,
    card: bytes,
    tensors: Iterable[tuple[str, F32]],
    weights: str,
    source: Source,
) -> None:
    """The fields of a :class:`Packed`, its tensors one by one; the header comes last."""
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, data in tensors:
        file.seek(-(-max(file.tell(), ALIGN) // ALIGN) * ALIGN)
        places[name] = (file.tell(), data.shape)
        file.write(np.ascontiguousarray(data).data)
    start = file.tell()
    index = {
        "config": asdict(config),
        "card": len(card),
        "tensors": places,
        "weights": weights,
        "source": [source.path, source.size, source.time],
    }
    text = json.dumps(index).encode()
    file.write(card + text)
    file.seek(0)
    file.write(MAGIC + start.to_bytes(8, "little") + len(text).to_bytes(8, "little"))


def read(path: Path) -> Packed:
    """Map a packed file, shared with all processes that do. Raises OSError or ValueError if it is not whole."""
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start, length = int.from_bytes(memory[8:16], "little"), int.from_bytes(memory[16:HEADER], "little")
    if memory[:8] != MAGIC or not start:
        raise ValueError(f"{path} is no packed model")
    try:
        index = json.loads(memory[len(memory) - length :])
        config, size, weights = LlamaConfig(**index["config"]), index["card"], index["weights"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is of another format") from error
    if start + size + length != len(memory):
        raise ValueError(f"{path} is not whole")
    memory.madvise(mmap.MADV_WILLNEED)
    tensors = {
        name: np.frombuffer(memory, np.float32, int(np.prod(shape)), offset).reshape(shape)
        for name, (offset, shape) in index["tensors"].items()
    }
    return Packed(config, memory[start : start + size], tensors, weights)


# ---- what nobody will read again


def sweep(cache: Path) -> None:
    """Delete packed files of earlier formats and of files that have changed or gone, and what killed processes left.

    Each under its own lock, and passed over while another process holds that; who has mapped one keeps it until it
    ends.  Lock files stay: one that is deleted while somebody waits for it locks nothing any more.
    """
    for path in cache.iterdir():
        name = OURS.fullmatch(path.name)
        if name is None:
            continue
        with contextlib.suppress(OSError), (cache / f"{name[1]}.packed.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.suffix == ".part" or _stale(path):
                path.unlink()


def _stale(path: Path) -> bool:
    """A later format is not ours to judge, nor is what has no header of ours."""
    with path.open("rb") as file:
        header = file.read(HEADER)
        if header[:6] != MAGIC[:6] or header[:8] > MAGIC:
            return False
        if header[:8] < MAGIC:
            return True
        try:
            file.seek(-min(int.from_bytes(header[16:], "little"), MAX_INDEX), os.SEEK_END)
            source = Source(*json.load(file)["source"])
            return Source.of(Path(source.path)) != source
        except (ValueError, KeyError, TypeError, FileNotFoundError):  # cut short, or its source is gone
            return True
