"""What `pip install` leaves behind: the `p2pdyn` command, the package, and no top-level `cli`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORMS = [pytest.param([], id="copied"), pytest.param(["--editable"], id="editable")]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def pip(python: Path | str, *arguments: str | Path, cwd: Path) -> None:
    offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(python, "-m", "pip", *arguments[:1], *offline, *arguments[1:], cwd=cwd)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the tracked files, so that the build leaves nothing in the repository."""
    copy = tmp_path / "source"
    copy.mkdir()
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=20).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A fresh environment that sees this one's packages (setuptools, the dependencies) but not its p2pdyn."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = Path(
        run(home / "bin/python", "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).stdout.strip()
    )
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "p2pdyn" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    return home / "bin/python"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_install_gives_the_command_and_no_top_level_cli(
    form: list[str], source: Path, python: Path, tmp_path: Path
) -> None:
    pip(python, "install", *form, source, cwd=tmp_path)

    assert "node" in run(python.parent / "p2pdyn", "--help", cwd=tmp_path).stdout
    probe = (
        "import importlib.util, p2pdyn.cli.main, p2pdyn;"
        "print(importlib.util.find_spec('cli'), importlib.util.find_spec('tests'), p2pdyn.__file__)"
    )
    cli, tests, where = run(python, "-c", probe, cwd=tmp_path).stdout.split()
    assert (cli, tests) == ("None", "None")
    assert Path(where).is_relative_to(source if form else python.parent.parent)


@pytest.mark.slow
def test_wheel_holds_the_whole_package_and_nothing_else(source: Path, tmp_path: Path) -> None:
    pip(sys.executable, "wheel", "--wheel-dir", tmp_path, source, cwd=tmp_path)

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"p2pdyn"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    modules = {str(path.relative_to(source)) for path in (source / "p2pdyn").rglob("*.py")}
    modules |= {f"p2pdyn/{path.relative_to(source)}" for path in (source / "cli").rglob("*.py")}
    assert modules <= names, f"not in setup.cfg's packages: {sorted(modules - names)}"
    data = {
        str(path.relative_to(source)) for path in (source / "p2pdyn").rglob("*") if path.suffix in {".json", ".jinja"}
    }
    assert data <= names
