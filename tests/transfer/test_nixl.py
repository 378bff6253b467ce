"""What is peculiar to NIXL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

import pytest
from support.kv_reader import TESTS, OwnerProcess, Reader, needs_nixl, run

from p2pdyn.transfer import nixl_thread
from p2pdyn.transfer.base import TransferError, dump_description, load_description
from p2pdyn.transfer.nixl import NixlMover

Owners = Callable[..., OwnerProcess]
pytestmark = needs_nixl


def python(*arguments: str, **environment: str) -> str:
    """What a Python process printed; its stderr must be empty."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": str(TESTS), **environment},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_posted_read_from_a_frozen_owner_is_not_over_until_it_is() -> None:
    """NIXL's own release would leave it writing, unseen. So blocks are given back only when nothing writes any more."""
    found = json.loads(python(str(TESTS / "support" / "kv_frozen.py"), UCX_TLS="tcp"))
    assert found["frozen"] == {"over": False, "reads": 1}
    assert found["error"] in ("it was cancelled", "the peer is gone")
    assert 0 < found["written"] < 64, "the slices that were posted, and no more"
    assert (found["again"], found["reads"], found["intact"]) == ("", 0, True)


def test_an_idle_mover_takes_no_processor_time() -> None:
    code = """
import asyncio, time
from support.kv_owner import allocate
from p2pdyn.transfer.nixl import NixlMover
async def main():
    mover = NixlMover("node-1", allocate(4, 4096), devices=("lo",))
    await mover.ready()
    before = time.process_time()
    await asyncio.sleep(1)
    print(time.process_time() - before)
    await mover.close()
asyncio.run(main())
"""
    assert float(python("-c", code)) < 0.3  # NIXL's default would be 1.0


def test_importing_the_mover_loads_neither_nixl_nor_numpy() -> None:
    code = "import sys, p2pdyn.transfer.nixl; print([m for m in ('nixl', 'numpy') if m in sys.modules])"
    assert python("-c", code) == "[]\n"


def test_a_mover_that_is_closed_at_once_ends_in_order(owners: Owners) -> None:
    async def body(reader: Reader) -> None:
        assert isinstance(reader.mover, NixlMover)

    run("nixl", body)


def test_whatever_keeps_nixl_from_starting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def agent(name: str, devices: Sequence[str]) -> NoReturn:
        raise MemoryError("no room")

    monkeypatch.setattr(nixl_thread, "Agent", agent)

    async def body(reader: Reader) -> None:
        with pytest.raises(TransferError, match=r"NIXL cannot start \(MemoryError\('no room'\)\)"):
            await reader.mover.ready()

    run("nixl", body)


def test_names_must_agree(owners: Owners) -> None:
    owner = owners("nixl")
    owner.name = "somebody-else"

    async def body(reader: Reader) -> None:
        with pytest.raises(TransferError, match="another name"):
            await reader.meet(owner)

    run("nixl", body)


def test_a_peer_that_cannot_be_met_again_costs_only_that(owners: Owners) -> None:
    """What NIXL had prepared for it is let go of once: a second time would end the process."""
    owner = owners("nixl")

    async def body(reader: Reader) -> None:
        mover = reader.mover
        assert isinstance(mover, NixlMover)
        for _ in range(20):
            await reader.meet(owner)
            known = load_description(owner.description, "nixl", mover.geometry.strides)
            with pytest.raises(TransferError, match="does not take its agent's description"):
                await mover.meet(owner.name, "127.0.0.1", dump_description(replace(known, agent=b"no metadata")))
            assert await reader.read(owner.name, [0], [0]) == "the peer is not known"
        await reader.meet(owner)
        assert await reader.read(owner.name, [0], [0]) == ""
        assert reader.has([0], [0])

    run("nixl", body)
