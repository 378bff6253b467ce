"""What each process loads: the core stays free of IO, and workers and the command line stay small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

IO = {
    "zmq",
    "zeroconf",
    "uvloop",
    "asyncio",
    "socket",
    "ssl",
    "selectors",
    "threading",
    "subprocess",
    "msgpack",
    "time",
}
HEAVY = {"numpy", "gguf", "tokenizers", "jinja2", "starlette", "uvicorn", "anyio", "importlib.metadata", "openai"}
# The interpreter itself loads time, and `random` and `dataclasses` bring a few of the rest; what counts is what we add.
ALWAYS = "import dataclasses, random, hashlib, heapq, enum, typing, inspect"


def loaded(code: str, before: str = "pass") -> set[str]:
    """Names of the modules that ``code`` adds to those of ``before``, in a fresh interpreter."""
    program = (
        f"import json, sys\n{before}\nhad = set(sys.modules)\n{code}\nprint(json.dumps(sorted(set(sys.modules) - had)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_core_loads_no_io() -> None:
    everything = (
        "import importlib, pkgutil, p2pdyn.core\n"
        "for module in pkgutil.iter_modules(p2pdyn.core.__path__, 'p2pdyn.core.'): importlib.import_module(module.name)"
    )

    added = loaded(everything, ALWAYS)

    assert "p2pdyn.core.membership" in added
    assert added & IO == set()
    assert {name for name in added if name.startswith(("p2pdyn.net", "p2pdyn.http", "p2pdyn.wire.codec"))} == set()


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import p2pdyn.node, p2pdyn.engines.sim", id="a sim worker"),
        pytest.param("import p2pdyn.cli.node", id="the node command"),
        pytest.param("import p2pdyn.cli.main", id="the command line"),
    ],
)
def test_small_processes_load_nothing_heavy(code: str) -> None:
    assert loaded(code) & HEAVY == set()


def test_a_frontend_loads_no_numpy() -> None:
    added = loaded("import p2pdyn.node, p2pdyn.http.server, p2pdyn.net.dispatch, p2pdyn.text.tokenizer")

    assert added & {"numpy", "gguf", "torch"} == set()
    assert added & {"starlette", "uvicorn", "anyio"} == set(), "they come with the first request that needs them"


NODE = """
import asyncio, json, sys
from pathlib import Path
from p2pdyn import node
from p2pdyn.config import Config
from p2pdyn.core.types import Address
had, make = set(), node.Sockets
def sockets(security):
    had.update(sys.modules)
    return make(security)
node.Sockets = sockets
async def main():
    stop = asyncio.Event()
    config = Config(Path(sys.argv[1]), "n", engine="sim", port=0, http=Address("127.0.0.1", 0))
    await node.run(config, ready=lambda info: stop.set(), stop=stop)
asyncio.run(main())
print(json.dumps(sorted(set(sys.modules) - had)))
"""


def test_a_node_imports_its_parts_before_its_loop_has_peers_to_answer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NODE, str(tmp_path)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr

    ours = {name for name in json.loads(done.stdout) if name.startswith("p2pdyn.")}

    assert {name for name in ours if not name.startswith("p2pdyn.engines.")} == set()
    assert "p2pdyn.engines.sim" in ours, "in a thread of its own"
