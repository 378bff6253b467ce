from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from p2pdyn import __version__
from p2pdyn.cli.main import COMMANDS
from p2pdyn.core.drain import FINISH_S, LIMIT_S
from p2pdyn.settings import SETTINGS

HEAVY = ("zmq", "starlette", "uvicorn", "numpy", "zeroconf", "tokenizers", "jinja2", "msgpack", "p2pdyn.node")


def p2pdyn(*args: str, text: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "p2pdyn", *args],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **env},
        check=False,
    )


def test_version_and_help() -> None:
    assert p2pdyn("--version").stdout == f"p2pdyn {__version__}\n"
    done = p2pdyn("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert "p2pdyn quickstart" in done.stdout


@pytest.mark.parametrize("command", [*COMMANDS, "bench membership", "bench route"])
def test_every_command_teaches_with_its_help(command: str) -> None:
    done = p2pdyn(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: p2pdyn {command} ")
    assert command in ("bench", "doctor") or "Example" in done.stdout


def test_drains_help_tells_its_limits() -> None:
    text = p2pdyn("drain", "--help").stdout
    assert f"after {FINISH_S:g} seconds" in " ".join(text.split())
    assert f"{LIMIT_S:g} seconds in all" in " ".join(text.split())


def test_nodes_help_names_every_setting() -> None:
    text = p2pdyn("node", "--help").stdout
    hidden = {"seeds", "config", "no_mdns", "mdns", "engine_args"}
    assert all(f"--{setting.replace('_', '-')} " in text for setting in SETTINGS if setting not in hidden)
    assert "--prefill-tps 20000" in text


BAD_USAGE = [
    (["nonsense"], "No such command 'nonsense'"),
    (["node", "--nonsense"], "--nonsense"),
    (["node", "stray"], "unexpected extra argument"),
    (["node", "--port"], "requires an argument"),
    (["node", "--port", "x"], "--port must be a whole number"),
    (["node", "--engine", "none", "--", "--itl-ms", "5"], "an engine argument needs an engine"),
    (["node", "--listen", "0.0.0.0"], "--cluster-key"),
    (["keygen"], "Missing argument"),
    (["drain"], "Missing argument"),
    (["peers", "--at", "host:7400:7400"], "write HOST:PORT, or [IPV6]:PORT"),
    (["peers", "--cluster-key", "/nonexistent"], "/nonexistent"),
    (["chat", "--at", "ftp://x"], "give http://HOST:PORT"),
    (["chat", "--api-key-file", "/nonexistent"], "cannot read the API key file"),
    (["quickstart", "--workers", "0"], "--workers"),
    (["quickstart", "--http", "8000"], "write HOST:PORT"),
    (["quickstart", "--http", "0.0.0.0:8000"], "p2pdyn node"),
    (["bench", "membership", "--loss", "2"], "--loss"),
]


@pytest.mark.parametrize(("args", "sentence"), BAD_USAGE)
def test_bad_usage_is_exit_code_2_and_one_sentence(args: list[str], sentence: str) -> None:
    done = p2pdyn(*args)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert sentence in done.stderr
    assert done.stderr.startswith("p2pdyn: ")
    assert done.stderr.count("\n") == 1


def test_settings_from_the_environment_are_checked_alike() -> None:
    done = p2pdyn("node", P2PDYN_PORT="x")
    assert (done.returncode, done.stderr.split(" must")[0]) == (2, "p2pdyn: P2PDYN_PORT")


FAILURES = [
    (
        ["peers", "--at", "127.0.0.1:1"],
        "is a node running there? Give its address with --at HOST:PORT, and --cluster-key FILE",
    ),
    (["drain", "w1", "--at", "127.0.0.1:1"], "is a node running there?"),
    (["chat", "--at", "http://127.0.0.1:1"], "start `p2pdyn node`"),
]


@pytest.mark.parametrize(("args", "sentence"), FAILURES)
def test_failure_is_exit_code_1_and_one_sentence(args: list[str], sentence: str) -> None:
    done = p2pdyn(*args)
    assert done.returncode == 1, done.stderr
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_ends_quietly() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m p2pdyn node --help | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def imported(statement: str) -> set[str]:
    """What a fresh interpreter has loaded after a statement."""
    code = f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("args", [["--help"], ["node", "--help"], ["chat", "--help"], ["node", "--port", "x"]])
def test_help_and_errors_load_nothing_heavy(args: list[str]) -> None:
    loaded = imported(f"from p2pdyn.cli.main import main; main({args!r})")
    assert loaded.isdisjoint(HEAVY)


def test_running_the_package_is_running_the_command(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("p2pdyn")
    if not script.exists():
        pytest.skip("p2pdyn is not installed beside this interpreter")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == p2pdyn("--version").stdout
