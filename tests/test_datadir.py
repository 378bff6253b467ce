from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pdyn.config import ConfigError, StartError
from p2pdyn.datadir import DataDir


def clock(*times: int) -> Callable[[], int]:
    return iter(times).__next__


def boot(path: Path, now_ms: int) -> tuple[str, int]:
    with DataDir(path, clock(now_ms)) as data:
        return data.node, data.epoch


def test_the_id_stays_and_the_epoch_grows_even_when_the_clock_steps_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "node"
    boots = [boot(path, now) for now in (5000, 9000, 100, 100, 9001)]
    assert len({node for node, _ in boots}) == 1
    assert re.fullmatch(r"[0-9a-f]{16}", boots[0][0])
    assert [epoch for _, epoch in boots] == [5000, 9000, 9001, 9002, 9003]


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b'{"node": "x", "epoch": 1}', b'{"node": "%s", "epoch": -1}' % (b"a" * 16)]
)
def test_a_lost_or_damaged_identity_becomes_a_new_one(tmp_path: Path, content: bytes | None) -> None:
    before = boot(tmp_path, 5000)
    file = tmp_path / "identity.json"
    file.unlink() if content is None else file.write_bytes(content)
    after = boot(tmp_path, 6000)
    assert after[0] != before[0]
    assert after[1] == 6000


def test_private(tmp_path: Path) -> None:
    path = tmp_path / "node"
    boot(path, 1)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [path, *path.iterdir()]}
    assert modes == {"node": 0o700, "identity.json": 0o600, "lock": 0o600}


def test_a_second_user_is_told_the_first_and_the_mend(tmp_path: Path) -> None:
    with DataDir(tmp_path), pytest.raises(ConfigError) as caught:
        DataDir(tmp_path)
    assert f"in use by process {os.getpid()}" in str(caught.value)
    assert "--name" in str(caught.value)
    boot(tmp_path, 1)


def test_the_lock_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from p2pdyn.datadir import DataDir; DataDir(pathlib.Path(sys.argv[1])); print(); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ConfigError, match=f"process {holder.pid}"):
            DataDir(tmp_path)
        holder.kill()
    boot(tmp_path, 1)


def test_the_epoch_is_durable_before_it_is_used(tmp_path: Path) -> None:
    with DataDir(tmp_path, clock(5000)) as data:
        assert json.loads((tmp_path / "identity.json").read_bytes()) == {"node": data.node, "epoch": 5000}


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(errno.ENOSPC, "disk full"), (errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied")],
)
def test_a_disk_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StartError) as caught:
            DataDir(tmp_path)
    assert sentence in str(caught.value)
    assert "--data-dir" in str(caught.value)
    boot(tmp_path, 1)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="cannot be used"):
        DataDir(tmp_path / "file")
