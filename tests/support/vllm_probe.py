"""Looks into the NIXL connector of a vLLM worker process: the worker class of tests, by --worker-extension-cls.

Every 50 ms the process writes what its connector holds to a file in FOLDER that is named after its process group, which
the host child leads.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from p2pdyn.engines.vllm.worker import Extension

FOLDER = "P2PDYN_TEST_PROBES"
"""The environment variable with the folder."""
TABLES = ("_recving_transfers", "_recving_metadata", "_reqs_to_send", "_reqs_to_process")
"""vLLM's own: handles of reads, requests that read, hand-overs with a lease, hand-overs being computed."""


class Probe(Extension):
    """What the product adds, in a module that is watched."""


def counts(folder: Path, group: int) -> dict[str, float]:
    """Entries of each table, and ``at``, CLOCK_MONOTONIC; empty while there is nothing yet."""
    try:
        told: dict[str, float] = json.loads((folder / str(group)).read_text())
    except FileNotFoundError:
        return {}
    return told


def _watch(folder: Path) -> None:
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group, has_kv_transfer_group

    file, fresh = folder / str(os.getpgrp()), folder / f"{os.getpid()}.new"
    while True:
        time.sleep(0.05)
        if has_kv_transfer_group():
            worker = get_kv_transfer_group().connector_worker
            told = {table: len(getattr(worker, table)) for table in TABLES}
            fresh.write_text(json.dumps({**told, "at": time.monotonic()}))
            fresh.replace(file)


if FOLDER in os.environ:
    threading.Thread(target=_watch, args=(Path(os.environ[FOLDER]),), name="probe", daemon=True).start()
