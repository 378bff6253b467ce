"""One answer: its choices, when it is written, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from p2pdyn.core.request import Failure, Job, Rejected
from p2pdyn.core.types import NodeId
from p2pdyn.http.backend import Backend
from p2pdyn.http.choices import CarefulChoice, Choice, StreamedChoice, WholeChoice
from p2pdyn.http.errors import HttpError
from p2pdyn.http.exchange import Exchange
from p2pdyn.http.formats import DONE, Shape
from p2pdyn.http.metrics import HttpMetrics
from p2pdyn.http.openai import Ask

PACE_S = 0.0001
"""Shortest time between two writes of an answer, for each open answer. A write, a system call with its share of the
loop, takes some 25 us: so all writes together take at most a quarter of the thread."""
MAX_PACE_S = 0.005
"""The longest that it becomes. Engines make a token each 5 to 50 ms and are not delayed."""


class Pacer:
    """Has answers written when the mesh has handed out all tokens that had come: at once if the answer was last written
    long enough ago, so each first token, otherwise together with others a little later.

    ``waiting`` are the answers with something to write, ``cancels`` the tickets of choices that a stop string ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[int], None], metrics: HttpMetrics) -> None:
        self.time = loop.time
        self.cancels: list[int] = []
        self.waiting: list[Reply] = []
        self._loop = loop
        self._cancel = cancel
        self._metrics = metrics
        self._late: list[Reply] = []

    def batch_done(self) -> None:
        if self.cancels:
            cancels, self.cancels = self.cancels, []
            for ticket in cancels:
                self._cancel(ticket)
        if not self.waiting:
            return
        now, pace, late = self.time(), self._pace(), self._late
        had = len(late)
        waiting, self.waiting = self.waiting, []
        for reply in waiting:
            if now - reply.written < pace:
                late.append(reply)
            else:
                reply.flush(now)
        if late and not had:
            self._loop.call_later(pace, self._flush_late)

    def _pace(self) -> float:
        return min(MAX_PACE_S, PACE_S * self._metrics.streams)

    def _flush_late(self) -> None:
        now = self.time()
        late, self._late = self._late, []
        for reply in late:
            reply.flush(now)


class Reply:
    """The answer to one request. ``prompt_tokens`` counts each prompt once."""

    __slots__ = (
        "_began", "_first", "_open", "_over", "_started", "_told", "_waits", "ask", "backend", "choices", "exchange",
        "form", "metrics", "migrations", "out", "pacer", "prompt_tokens", "silent", "workers", "written",
    )  # fmt: skip

    def __init__(
        self,
        exchange: Exchange,
        backend: Backend,
        metrics: HttpMetrics,
        pacer: Pacer,
        form: Shape,
        ask: Ask,
        silent: frozenset[int],
        prompt_tokens: int,
        began: float,
    ) -> None:
        self.exchange, self.backend, self.metrics, self.pacer = exchange, backend, metrics, pacer
        self.form, self.ask, self.silent = form, ask, silent
        self.prompt_tokens = prompt_tokens
        self.choices: list[Choice] = []
        self.workers: list[NodeId] = []
        self.migrations = 0
        self.out: list[bytes] = []
        self.written = 0.0
        """When."""
        self._began = began
        self._open = self._told = 0
        self._first = True
        self._started = self._over = self._waits = False

    def start(self, jobs: Sequence[tuple[Job, int, str]]) -> None:
        """Submit (job, number of its prompt, text to echo) for each choice. Raises Rejected; then nothing is left."""
        self.exchange.on_disconnect = self._left
        self.metrics.streams += 1
        self._open = len(jobs)
        self.choices = [self._choice(index, prompt, echo) for index, (_, prompt, echo) in enumerate(jobs)]
        for choice, (job, _, _) in zip(self.choices, jobs, strict=True):
            if self._over:
                return
            try:
                ticket = self.backend.submit(job, choice)
            except Rejected:
                self._cancel_all()
                raise
            self._submitted(choice, ticket)

    def _submitted(self, choice: Choice, ticket: int) -> None:
        choice.ticket = ticket
        if self._over and not choice.ended:
            self.backend.cancel(ticket)

    def _choice(self, index: int, prompt: int, echo: str) -> Choice:
        ask = self.ask
        if echo or ask.stops or self.silent or ask.params.logprobs is not None:
            return CarefulChoice(self, index, prompt, echo)
        return StreamedChoice(self, index, prompt) if ask.stream else WholeChoice(self, index, prompt)

    def wait_for_flush(self) -> None:
        if not self._waits:
            self._waits = True
            self.pacer.waiting.append(self)

    def first_token(self) -> None:
        if self._first:
            self._first = False
            self.metrics.ttft.observe(self.pacer.time() - self._began)

    def flush(self, now: float) -> None:
        """Write what the choices have made, in one go."""
        self._waits = False
        if self._over:
            return
        told = 0
        for choice in self.choices:
            choice.drain()
            told += choice.count
        if self.out:
            if told > self._told > 0:
                self.metrics.itl.observe((now - self.written) / (told - self._told))
            self.written, self._told = now, told
            self._write(last=False)

    def cancel_later(self, choice: Choice) -> None:
        """A stop string was found. The mesh is in the middle of handing out tokens, so it hears of it at the flush."""
        if choice.ticket is not None:
            self.pacer.cancels.append(choice.ticket)

    def choice_ended(self, choice: Choice, rest: str) -> None:
        self._open -= 1
        self.metrics.output_tokens += choice.count
        last = self._open == 0
        if self.ask.stream:
            choice.drain()
            more = {} if not last or self.ask.include_usage else {"p2pdyn": self._facts()}
            finish = self.form.finish(choice.index, rest, choice.finish, choice.unsaid)
            self.out.append(self.form.chunk([finish], more))
        if last:
            self._complete()

    def fail(self, failure: Failure) -> None:
        """The whole answer fails: with a status while nothing has been sent, else with a last event."""
        if self._over:
            return
        error = HttpError.of(failure)
        self._cancel_all()
        if not self._started:
            self.exchange.fail(error)
            return
        self.out.append(b"data: %b\n\n" % error.body())
        self._write(last=True)

    def _complete(self) -> None:
        self.metrics.duration.observe(self.pacer.time() - self._began)
        self._finish()
        if self.ask.stream:
            if self.ask.include_usage:
                self.out.append(self.form.chunk([], {"usage": self._usage(), "p2pdyn": self._facts()}))
            self.out.append(DONE)
            self._write(last=True)
        else:
            bodies = [choice.body() for choice in self.choices]
            self.exchange.respond(200, self.form.whole(bodies, self._usage(), self._facts()), self._headers())
        self.choices = []  # they refer back to it: without them nothing waits for the garbage collector

    def _write(self, last: bool) -> None:
        if not self._started:
            self._started = True
            self.exchange.stream(self._headers())
        data = self.out[0] if len(self.out) == 1 else b"".join(self.out)
        self.out.clear()
        self.exchange.write(data, last)

    def _headers(self) -> bytes:
        worker = self.workers[0].encode() if self.workers else b""
        return b"x-p2pdyn-worker: %b\r\nx-p2pdyn-resumable: %d\r\n" % (worker, self.ask.resumable)

    def _facts(self) -> dict[str, Any]:
        return {"workers": self.workers, "migrations": self.migrations}

    def _usage(self) -> dict[str, Any]:
        output = sum(choice.count for choice in self.choices)
        cached: dict[int, int] = {}
        for choice in self.choices:
            cached[choice.prompt] = max(cached.get(choice.prompt, 0), choice.cached)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": output,
            "total_tokens": self.prompt_tokens + output,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    def _left(self) -> None:
        """The client is gone: the workers hear of it at once."""
        self.out.clear()
        self._cancel_all()

    def _cancel_all(self) -> None:
        open_choices = [choice for choice in self.choices if not choice.ended]
        self.choices = []
        self._finish()
        for choice in open_choices:
            choice.ended = True
            if choice.ticket is not None:
                self.backend.cancel(choice.ticket)

    def _finish(self) -> None:
        if not self._over:
            self._over = True
            self.metrics.streams -= 1
            self.exchange.on_disconnect = None
