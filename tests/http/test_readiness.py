"""/ready of a frontend over its mesh: whether requests can be answered, and what is amiss with the workers' roles."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
from support.endpoint import Client, run

from p2pdyn.core.request import Job, Logprobs, Outcome, Rejected
from p2pdyn.core.types import READY, Address, NodeId, PeerInfo, SamplingParams, ServedModel
from p2pdyn.http.server import HttpServer, HttpSettings
from p2pdyn.net.curve import Security
from p2pdyn.net.dispatch import Dispatcher
from p2pdyn.net.sockets import Sockets

Peer = tuple[NodeId, int, Address, PeerInfo]


def peer(number: int, role: str, model: str = "m") -> Peer:
    served = ServedModel(model, "c" * 32, "f" * 16, 16, 1024, moves_kv="ours")
    info = PeerInfo("w", "0", role, "sim", state=READY, models=(served,), requests_port=1, events_port=2)
    return NodeId(f"{number:016x}"), 1, Address("127.0.0.1", 1), info


@contextmanager
def frontend(peers: list[Peer]) -> Iterator[Dispatcher]:
    sockets = Sockets(Security.insecure())
    dispatcher = Dispatcher(
        sockets, NodeId("f" * 16), 1, "kv", random.Random(1),
        eager=False, suspect=lambda node: None, report=dict, mesh_metrics=list,
    )  # fmt: skip
    try:
        dispatcher.refresh(peers)
        yield dispatcher
    finally:
        dispatcher.close()
        sockets.close()


class Unheard:
    """A sink of a request that is never accepted."""

    def on_routed(self, worker: NodeId) -> None: ...

    def on_tokens(self, tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None: ...

    def on_end(self, outcome: Outcome) -> None: ...


@pytest.mark.parametrize(
    ("peers", "status", "detail"),
    [
        ([], 503, "no worker of any model is ready"),
        ([peer(1, "aggregated")], 200, "ready"),
        ([peer(1, "prefill"), peer(2, "decode")], 200, "ready"),
        (
            [peer(1, "prefill"), peer(2, "prefill")],
            503,
            "model 'm' has prefill workers alone, which answer nothing: start one with --role decode",
        ),
        (
            [peer(1, "decode")],
            200,
            "model 'm' has decode workers alone, which compute each prompt themselves: start one with --role prefill",
        ),
        (
            [peer(1, "aggregated"), peer(2, "prefill", "other")],
            200,
            "model 'other' has prefill workers alone, which answer nothing: start one with --role decode",
        ),
    ],
)
def test_ready_says_what_the_workers_roles_lack(peers: list[Peer], status: int, detail: str) -> None:
    async def main() -> None:
        with frontend(peers) as dispatcher:
            server = HttpServer(dispatcher, HttpSettings(Address("127.0.0.1", 0)))
            url = await server.start()
            try:
                async with Client(int(url.rpartition(":")[2])) as client:
                    answer = await client.get("/ready")
            finally:
                await server.stop(0.2)
        assert (answer.status, answer.json()["detail"]) == (status, detail)
        assert answer.json()["status"] == ("ready" if status == 200 else "not ready")

    run(main())


def test_prefill_workers_are_not_asked_for_answers() -> None:
    async def main() -> None:
        prefill = peer(1, "prefill")
        job = Job("m", array("I", [1]), SamplingParams())
        with frontend([prefill]) as dispatcher:
            assert [(model.name, model.ready) for model in dispatcher.models()] == [("m", 0)]
            with pytest.raises(Rejected, match="prefill workers alone") as refused:
                dispatcher.submit(job, Unheard())
            assert (refused.value.failure.status, refused.value.failure.code) == (503, "no_ready_worker")
            dispatcher.refresh([prefill, peer(2, "decode")])
            assert [(model.name, model.ready) for model in dispatcher.models()] == [("m", 1)]
            with pytest.raises(Rejected, match="is not a ready worker of model"):
                dispatcher.submit(replace(job, pin=prefill[0]), Unheard())

    run(main())
