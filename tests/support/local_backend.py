"""A Backend in this process: the real simulated engine, without mesh or wire."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from p2pdyn.core.request import Failure, Job, Outcome, Rejected, Sink
from p2pdyn.core.types import NodeId
from p2pdyn.engines import sim
from p2pdyn.engines.base import EngineOptions
from p2pdyn.engines.base import Sequence as EngineSequence
from p2pdyn.http.backend import ModelStatus
from p2pdyn.text.card import ModelCard

WORKER = NodeId("00000000000000aa")


class LocalBackend:
    """One worker, one model ``sim``. ``failure`` set: submit raises it. ``running`` shows what has not ended."""

    def __init__(self, *args: str) -> None:
        self.engine = sim.create(EngineOptions(model=None, served_name="sim", args=args))
        self.info = self.engine.load(lambda fraction, what: None)
        self._card = ModelCard.unpack(self.info.card)
        self.running: dict[int, Sink] = {}
        self.jobs: list[Job] = []
        self.failure: Failure | None = None
        self.on_batch: Callable[[], None] = lambda: None
        self.cancelled: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._next = 1

    def models(self) -> list[ModelStatus]:
        return [ModelStatus("sim", 1, self.info.block_size, self.info.context, 1_700_000_000)]

    def context(self, model: str) -> int:
        return self.info.context if model == "sim" else 0

    def known_card(self, model: str) -> ModelCard | None:
        return self._card if model == "sim" else None

    async def card(self, model: str) -> ModelCard:
        if model != "sim":
            raise Rejected(Failure(404, "model_not_found", f"The model {model!r} does not exist here."))
        return self._card

    def submit(self, job: Job, sink: Sink) -> int:
        if self.failure is not None:
            raise Rejected(self.failure)
        ticket, self._next = self._next, self._next + 1
        self.jobs.append(job)
        self.running[ticket] = sink
        sink.on_routed(WORKER)
        sequence = EngineSequence(ticket, array("I", job.tokens), len(job.tokens), job.params)
        self.engine.submit(sequence, self._loop.time())
        self._arm()
        return ticket

    def cancel(self, ticket: int) -> None:
        if self.running.pop(ticket, None) is not None:
            self.cancelled.append(ticket)
            self.engine.abort(ticket, self._loop.time())

    def lose(self, failure: Failure) -> None:
        """Every open job fails, as when its worker is lost and nothing else can go on."""
        for ticket, sink in list(self.running.items()):
            self.running.pop(ticket, None)
            self.engine.abort(ticket, self._loop.time())
            sink.on_end(Outcome("error", (WORKER,), 0, failure))

    def peers(self) -> dict[str, Any]:
        return {"cluster": "test", "self": "00", "peers": []}

    def readiness(self) -> tuple[bool, str]:
        return (False, str(self.failure.message)) if self.failure else (True, "ready")

    def metrics(self) -> list[tuple[str, str, str, list[tuple[dict[str, str], float]]]]:
        return [("p2pdyn_test", "gauge", "A mesh's own.", [({"worker": 'a"b'}, 1.0)])]

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        due = self.engine.next_step(self._loop.time())
        if self._timer is None and due is not None:
            self._timer = self._loop.call_at(due, self._step)

    def _step(self) -> None:
        self._timer = None
        for output in self.engine.step(self._loop.time()).outputs:
            sink = self.running.get(output.key)
            if sink is None:
                continue
            if output.tokens:
                sink.on_tokens(output.tokens, output.logprobs, output.cached)
            if output.finish and self.running.pop(output.key, None) is not None:
                sink.on_end(self._outcome(output.finish, output.detail))
        self.on_batch()
        self._arm()

    @staticmethod
    def _outcome(finish: str, detail: str) -> Outcome:
        if finish in ("stop", "length"):
            return Outcome(finish, (WORKER,))
        return Outcome("error", (WORKER,), 0, Failure(400, "invalid_request", detail))


def texts(events: Sequence[dict[str, Any]]) -> str:
    """The text of a streamed chat, of its first choice."""
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
