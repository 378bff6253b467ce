"""Clusters of prefill and decode workers for tests: who moved what, and whether all is given back."""

from __future__ import annotations

import asyncio
import json
import random
import string
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from p2pdyn.core.types import Address
from p2pdyn.net.admin import admin_call
from p2pdyn.net.curve import Security
from p2pdyn.net.sockets import Sockets
from support import handing_frontend, held_node
from support.nodes import Cluster, NodeProcess, wait_for

GIVEN_BACK_S = 5.0
"""Longest until no block is lent, no lease stands and no read runs any more."""

ENGINES = {
    "sim": ("--", "--itl-ms", "2"),
    "builtin": ("--model", "tiny", "--", "--max-batch-tokens", "64", "--context", "4096"),
}
MODELS = {"sim": "sim", "builtin": "tiny"}


def prompt(tokens: int, seed: int) -> str:
    """A text of that many tokens of the byte-level cards, unlike any other seed's from its first block on."""
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=tokens))


class PdCluster:
    """One frontend, prefill and decode workers of one engine, CURVE on, ``mover`` between them. ``always``: every
    prompt is handed over (:mod:`support.handing_frontend`), else the router decides."""

    def __init__(self, cluster: Cluster, engine: str = "sim", mover: str = "nixl", *, always: bool = True) -> None:
        self.cluster = cluster
        self.engine = engine
        self.mover = mover
        program = (sys.executable, *((handing_frontend.__file__,) if always else ("-m", "p2pdyn")))
        self.frontend = cluster.start("f", "--http", "127.0.0.1:0", engine="none", program=program).wait_ready()
        self.workers: list[NodeProcess] = []

    def start(
        self,
        name: str,
        role: str,
        *,
        hold: Path | None = None,
        args: Sequence[str] = (),
        program: Sequence[str] | None = None,
    ) -> NodeProcess:
        """A worker that is being started; ``hold``: its reads wait there (:mod:`support.held_node`)."""
        program = program or (sys.executable, "-m", "p2pdyn")
        if hold is not None:
            hold.mkdir(exist_ok=True)
            program = (sys.executable, held_node.__file__, str(hold))
        node = self.cluster.start(
            name, "--no-http", "--role", role, "--kv-transfer", self.mover, *(args or ENGINES[self.engine]),
            engine=self.engine, seeds=[self.frontend], program=program,
        )  # fmt: skip
        self.workers.append(node)
        return node

    def ready(self) -> PdCluster:
        """All workers are, and each decode worker can read from each prefill worker."""
        for worker in self.workers:
            worker.wait_ready(60)
        owners = sum(worker.ready is not None and worker.ready["role"] == "prefill" for worker in self.workers)
        for worker in self.workers:
            if worker.ready is not None and worker.ready["role"] == "decode":
                wait_for(
                    lambda w=worker: sum(self.transfers(w)["owners"].values()) == owners, 15, "the workers have met"
                )
        peers = lambda: self.frontend.peers(self.cluster.key)["peers"]  # noqa: E731
        wait_for(
            lambda: sum(peer["state"] == "ready" for peer in peers()) == len(self.workers) + 1, 10, "all seen as ready"
        )
        return self

    def transfers(self, worker: NodeProcess) -> dict[str, Any]:
        """What the worker says of its transfers, and its load."""
        assert self.cluster.key is not None
        security = Security.load(self.cluster.key)

        async def call() -> dict[str, Any]:
            sockets = Sockets(security)
            try:
                return await admin_call(sockets, Address.parse(worker.mesh), "peers", {}, 5)
            finally:
                sockets.close()

        report = asyncio.run(call())
        own = next(peer for peer in report["peers"] if peer["id"] == report["self"])
        return {**own["load"], **report["transfers"]}

    def complete(self, text: str, tokens: int = 24, **more: Any) -> tuple[str, dict[str, Any]]:
        """The greedy answer, and the body."""
        return complete(self.frontend, MODELS[self.engine], text, tokens, **more)

    def stage(self, worker: NodeProcess, state: str) -> None:
        """Wait until one of the worker's pulls is in ``state``."""
        wait_for(lambda: self.transfers(worker)["pulls"][state], 15, lambda: f"{state}: {self.transfers(worker)}")

    def all_given_back(self, *workers: NodeProcess) -> None:
        """Within GIVEN_BACK_S nothing is lent, read, pulled or held by a sequence on these workers."""

        def left() -> list[Any]:
            found: list[Any] = []
            for worker in workers:
                report = self.transfers(worker)
                under_way = (*report["leases"].values(), *report["pulls"].values())
                if any(under_way) or report["blocks_lent"] or report["reads"] or report["kv_used"]:
                    found.append((worker.process.args[-1], report))
            return found

        wait_for(lambda: not left(), GIVEN_BACK_S, lambda: f"still under way: {left()}")


class Asked(threading.Thread):
    """A completion under way."""

    def __init__(self, pd: PdCluster, text: str, **more: Any) -> None:
        super().__init__()
        self.text = ""
        self.error: Exception | None = None
        self._ask = lambda: pd.complete(text, **more)[0]
        self.start()

    def run(self) -> None:
        try:
            self.text = self._ask()
        except Exception as error:
            self.error = error

    def answer(self) -> str:
        self.join(45)
        assert not self.is_alive(), "no answer"
        if self.error is not None:
            raise self.error
        return self.text


def reference(
    folder: Path, engine: str, prompts: Sequence[str], tokens: int = 24, args: Sequence[str] = ()
) -> list[str]:
    """What one aggregated worker answers."""
    folder.mkdir()
    with Cluster(folder) as nodes:
        args = args or ENGINES[engine]
        node = nodes.start("one", "--http", "127.0.0.1:0", *args, engine=engine).wait_ready(60)
        return [complete(node, MODELS[engine], text, tokens)[0] for text in prompts]


def complete(
    node: NodeProcess, model: str, text: str, tokens: int, headers: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, dict[str, Any]]:
    """The greedy answer, and the body."""
    body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{node.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=40) as answer:
        found = json.load(answer)
    return found["choices"][0]["text"], found
