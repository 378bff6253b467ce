"""One answer and its choices: tokens in, bytes out.

A :class:`Choice` is the Sink of one job.  The mesh calls it once an engine step and then flushes it; nothing awaits.
A plain token (no stop strings, no logprobs, a whole character) costs one dictionary look-up and one concatenation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from p2pdyn.core.request import Failure, Job, Logprobs, Outcome, Rejected
from p2pdyn.core.types import NodeId
from p2pdyn.http.backend import Backend
from p2pdyn.http.errors import HttpError
from p2pdyn.http.exchange import Exchange
from p2pdyn.http.formats import DONE, Shape, escaped
from p2pdyn.http.metrics import HttpMetrics
from p2pdyn.http.openai import Ask
from p2pdyn.text.stops import StopMatcher

PACE_S = 0.001
"""Shortest time between two writes of one answer. Engines make a token each 5 to 50 ms, and are not delayed by it; what
comes faster costs one system call a millisecond instead of one a token."""


class Choice:
    """One sequence of the answer. ``index`` is its number in the answer, ``prompt`` that of its prompt."""

    __slots__ = (
        "_detokenizer", "_entries", "_escaped", "_head", "_ids", "_joint", "_matcher", "_next_head", "_out", "_parts",
        "_plain", "_silent", "_stream", "_tail", "_texts", "_written", "cached", "count", "ended", "finish", "index",
        "prompt", "reply", "ticket",
    )  # fmt: skip

    def __init__(self, reply: Reply, index: int, prompt: int, echo: str) -> None:
        self.reply = reply
        self.index, self.prompt = index, prompt
        self.ticket: int | None = None
        self.count = self.cached = 0
        self.ended, self.finish = False, ""
        ask, form = reply.ask, reply.form
        self._out = reply.out
        self._head, self._next_head = form.heads(index)
        self._tail = form.middle + b"null" + form.end
        self._joint = self._tail + self._next_head
        self._stream = ask.stream
        self._texts: list[bytes] = []
        """JSON-escaped, of plain tokens not yet made into events."""
        self._escaped = reply.tokenizer.escaped
        self._detokenizer = reply.tokenizer.detokenizer()
        self._matcher = StopMatcher(ask.stops) if ask.stops else None
        self._entries: list[dict[str, Any]] | None = None if ask.params.logprobs is None else []
        self._silent = reply.silent
        self._plain = not (ask.stops or self._silent) and self._entries is None
        self._ids: list[int] = []
        self._parts: list[str] = []
        self._written = 0
        if echo:
            self._emit(echo, None)

    # ---- Sink

    def on_routed(self, worker: NodeId) -> None:
        if worker not in self.reply.workers:
            self.reply.workers.append(worker)

    def on_tokens(self, tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None:
        if self.ended:
            return
        reply = self.reply
        if not self.count:
            self.cached = cached
            reply.first_token()
        if not self._plain:
            self._push_carefully(tokens, logprobs)
        elif self._stream:
            self.count += len(tokens)
            known, detokenizer, add = self._escaped, self._detokenizer, self._texts.append
            for token in tokens:
                text = None if detokenizer.pending else known.get(token)
                add(escaped(detokenizer.push(token)) if text is None else text)
        else:
            self.count += len(tokens)
            self._ids.extend(tokens)
            return
        if not reply.dirty:
            reply.dirty = True
            reply.pacer.waiting.append(reply)

    def drain(self) -> None:
        """Make events of the plain tokens that wait."""
        texts = self._texts
        if texts:
            self._out.append(self._head + self._joint.join(texts) + self._tail)
            self._head = self._next_head
            texts.clear()

    def on_end(self, outcome: Outcome) -> None:
        if self.ended:
            return
        self.reply.migrations += outcome.migrations
        if outcome.finish not in ("stop", "length"):
            gone = Failure(503, "worker_lost", "The request was ended by the cluster before its end.", 1)
            self.reply.fail(outcome.failure or gone)
            return
        self._end(outcome.finish, self._rest())

    # ---- inside

    def _push_carefully(self, tokens: Sequence[int], logprobs: Logprobs) -> None:
        minimum = self.reply.ask.params.min_tokens
        for position, token in enumerate(tokens):
            self.count += 1
            text = "" if token in self._silent else self._detokenizer.push(token)
            entry = None
            if self._entries is not None and position < len(logprobs):
                entry = self.reply.form.entry(token, logprobs[position], self._written)
            if self._matcher is not None and self.count > minimum:
                text = self._matcher.push(text)
            self._emit(text, entry)
            if self._matcher is not None and self._matcher.found:
                self.reply.cancel_later(self)
                self._end("stop", "")
                return

    def _emit(self, text: str, entry: dict[str, Any] | None) -> None:
        self._written += len(text)
        if not self.reply.ask.stream:
            self._parts.append(text)
            if entry is not None and self._entries is not None:
                self._entries.append(entry)
            return
        tail = self._tail
        if entry is not None:
            form = self.reply.form
            tail = form.middle + form.logprobs([entry]) + form.end
        self._out.append(self._head + escaped(text) + tail)
        self._head = self._next_head

    def _rest(self) -> str:
        """Text that only the end of the sequence sets free."""
        if self._plain and not self.reply.ask.stream:
            return self.reply.tokenizer.decode(self._ids)
        rest = self._detokenizer.finish()
        if self._matcher is not None:
            rest = self._matcher.push(rest)
            rest += self._matcher.finish()
        return rest

    def _end(self, finish: str, rest: str) -> None:
        self.ended, self.finish = True, finish
        if not self.reply.ask.stream:
            self._parts.append(rest)
        self.reply.choice_ended(self, rest)

    @property
    def unsaid(self) -> bool:
        """No event of this choice has been made yet."""
        return self._head is not self._next_head

    def body(self) -> dict[str, Any]:
        return self.reply.form.choice(self.index, "".join(self._parts), self.finish, self._entries)


class Pacer:
    """Has answers written when the mesh has handed out all tokens that had come, but at most once a :data:`PACE_S`.
    ``waiting`` are the answers with something to write, ``cancels`` the tickets of choices that a stop string ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[int], None]) -> None:
        self._loop = loop
        self._cancel = cancel
        self.cancels: list[int] = []
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.waiting: list[Reply] = []

    def batch_done(self) -> None:
        if self.cancels:
            cancels, self.cancels = self.cancels, []
            for ticket in cancels:
                self._cancel(ticket)
        if self.waiting and self._timer is None:
            now = self._loop.time()
            if now - self._last >= PACE_S:
                self._flush(now)
            else:
                self._timer = self._loop.call_at(self._last + PACE_S, self._late)

    def _late(self) -> None:
        self._timer = None
        self._flush(self._loop.time())

    def _flush(self, now: float) -> None:
        self._last = now
        waiting, self.waiting = self.waiting, []
        for reply in waiting:
            reply.flush(now)


class Reply:
    """The answer to one request. ``prompt_tokens`` counts each prompt once."""

    def __init__(
        self,
        exchange: Exchange,
        backend: Backend,
        metrics: HttpMetrics,
        pacer: Pacer,
        form: Shape,
        ask: Ask,
        silent: frozenset[int],
        began: float,
    ) -> None:
        self.exchange, self.backend, self.metrics = exchange, backend, metrics
        self.form, self.ask, self.tokenizer, self.silent = form, ask, form.tokenizer, silent
        self.loop = asyncio.get_running_loop()
        self.out: list[bytes] = []
        self.workers: list[NodeId] = []
        self.migrations = 0
        self.prompt_tokens = 0
        self.choices: list[Choice] = []
        self._began = began
        self._open = 0
        self._started = False
        self._over = False
        self._first = True
        self.pacer = pacer
        self.dirty = False
        """It waits for the pacer."""
        self._last_write = 0.0
        self._told = 0

    def start(self, jobs: Sequence[tuple[Job, int, str]]) -> None:
        """Submit (job, number of its prompt, text to echo) for each choice. Raises Rejected; then nothing is left."""
        self.exchange.on_disconnect = self._left
        self.metrics.streams += 1
        self._open = len(jobs)
        self.choices = [Choice(self, index, prompt, echo) for index, (_, prompt, echo) in enumerate(jobs)]
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

    def first_token(self) -> None:
        if self._first:
            self._first = False
            self.metrics.ttft.observe(self.loop.time() - self._began)

    def flush(self, now: float) -> None:
        """Write what the choices have made, in one go."""
        self.dirty = False
        if self._over:
            return
        told = 0
        for choice in self.choices:
            choice.drain()
            told += choice.count
        if self.out:
            if self._last_write and told > self._told:
                self.metrics.itl.observe((now - self._last_write) / (told - self._told))
            self._last_write, self._told = now, told
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
        self.metrics.duration.observe(self.loop.time() - self._began)
        self._finish()
        if self.ask.stream:
            if self.ask.include_usage:
                self.out.append(self.form.chunk([], {"usage": self._usage(), "p2pdyn": self._facts()}))
            self.out.append(DONE)
            self._write(last=True)
            return
        bodies = [choice.body() for choice in self.choices]
        self.exchange.respond(200, self.form.whole(bodies, self._usage(), self._facts()), self._headers())

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
