from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

from p2pdyn.net.curve import Security


def keygen(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "p2pdyn", "keygen", str(path)], capture_output=True, text=True, timeout=30, check=False
    )


def test_writes_a_key_for_its_owner_only_and_names_its_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    done = keygen(path)
    assert done.returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Security.load(path).fingerprint in done.stdout
    assert f"--cluster-key {path}" in done.stdout


def test_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    keygen(path)
    before = path.read_bytes()
    done = keygen(path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "exists: give a new name" in done.stderr
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = keygen(tmp_path / "missing" / "cluster.key")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot write" in done.stderr
