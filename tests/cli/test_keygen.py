from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

from p2pdyn.net.curve import Security


def keygen(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "p2pdyn", "keygen", *options, str(path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
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
    assert "exists: give a new name, or replace the key in it" in done.stderr
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = keygen(tmp_path / "missing" / "cluster.key")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot write" in done.stderr


def test_a_rotation_goes_in_three_steps_and_says_what_comes_next(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    keygen(path)
    (old,) = Security.load(path).keys
    added = keygen(path, "--add")
    assert "to every node" in added.stdout
    kept, new = Security.load(path).keys
    assert kept == old
    keygen(path, "--swap")
    assert Security.load(path).keys == (new, old)
    keygen(path, "--drop")
    assert Security.load(path).keys == (new,)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.key"]
    secrets = {line.split()[1] for line in path.read_text().splitlines() if not line.startswith("#")}
    assert not any(secret in added.stdout for secret in secrets)


def test_steps_out_of_turn_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    keygen(path)
    for step, why in (("--swap", "a rotation begins with --add"), ("--drop", "a rotation begins with --add")):
        before = path.read_bytes()
        done = keygen(path, step)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert why in done.stderr
        assert path.read_bytes() == before
    keygen(path, "--add")
    assert "holds two keys already" in keygen(path, "--add").stderr
