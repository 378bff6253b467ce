"""Every open request of one worker: whose it is, and what goes back to whom.

Engine steps come in by :meth:`Served.outputs` and leave by :meth:`Served.take`, at the shell's pace: all tokens of a
request since the last take are one row.  A request is open until the row with its finish has been taken, so that
nothing said in between (a heartbeat, an engine's death) can overtake it.

A request is known by (connection, rid, attempt); the engine knows it by a key of ours.  The connection is the ROUTER's
routing id, automatic and so never that of an earlier connection.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from p2pdyn.core.request import Logprobs
from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import Output, Sequence
from p2pdyn.wire.requests import Generate, Refused, Row


@dataclass(slots=True)
class Running:
    key: int
    connection: bytes
    rid: int
    attempt: int
    offset: int
    """Of the first token in ``held``: generated tokens so far, those of earlier attempts included."""
    whole: bool = False
    """The client waits for the whole answer: between the first token and the last, only ``take(held_back=True)``
    takes them. The first goes early as it tells how long the prompt took."""
    held: list[int] = field(default_factory=list)
    """Generated, not taken yet."""
    waiting: bool = False
    """Among the due, or held back."""
    finish: str = ""
    cached: int = 0
    logprobs: Logprobs = ()
    started: bool = False
    """Its first output has come in."""


@dataclass(slots=True)
class Connection:
    heard: float
    frontend: str = ""
    open: dict[int, Running] = field(default_factory=dict)


class Served:
    """Pure bookkeeping; ``now`` in seconds."""

    def __init__(self, epoch: int, models: Iterable[str], context: int, max_open: int) -> None:
        self.epoch = epoch
        self._models = frozenset(models)
        self._context = context
        self._max_open = max_open
        self._next_key = 1
        self.tokens = 0
        """Taken so far."""
        self.draining = False
        self.stalled = ""
        """Why nothing new can run: the engine stands still."""
        self.started: list[tuple[int, int]] = []
        """(key, cached prompt tokens) of those whose first output has come in; the caller clears it."""
        self._due: list[Running] = []
        self._ended = 0
        self.connections: dict[bytes, Connection] = {}
        self.running: dict[int, Running] = {}
        self.refused: list[tuple[Running, str]] = []
        """What the engine will not run, and why: forgotten, to be told."""

    def hello(self, connection: bytes, frontend: str, now: float) -> None:
        known = self.connections.get(connection)
        if known is None:
            self.connections[connection] = Connection(now, frontend)
        else:
            known.heard = now
            known.frontend = frontend

    def admit(
        self, connection: bytes, message: Generate, params: SamplingParams, now: float
    ) -> tuple[Sequence | None, Refused | None, list[int]]:
        """A generate: the sequence to run, or the refusal, and the keys of older attempts to abort."""
        known = self.connections.setdefault(connection, Connection(now))
        known.heard = now
        older = known.open.get(message.rid)
        if older is not None and older.attempt >= message.attempt:
            return None, None, []
        refusal = self._refusal(message)
        aborts = [self._forget(older)] if older is not None else []
        if refusal is not None:
            return None, Refused(message.rid, message.attempt, *refusal), aborts
        tokens = array("I")
        tokens.frombytes(message.tokens)
        offset = len(tokens) - message.prompt_len
        running = Running(self._next_key, connection, message.rid, message.attempt, offset, whole=message.whole)
        self._next_key += 1
        known.open[message.rid] = running
        self.running[running.key] = running
        more = (message.traceparent, message.rank, message.hand_over, message.pull, message.remote)
        return Sequence(running.key, tokens, message.prompt_len, params, *more), None, aborts

    def _refusal(self, message: Generate) -> tuple[str, str] | None:
        count = len(message.tokens) // 4
        if message.epoch != self.epoch:
            return "epoch", f"the worker was restarted: it has epoch {self.epoch}, the request is for {message.epoch}"
        if self.draining:
            return "draining", "the worker is draining"
        if self.stalled:
            return "model", f"the worker's engine stands still ({self.stalled})"  # "stalled" is for what it had
        if message.model not in self._models:
            return "model", f"the worker does not serve model {message.model!r}"
        if len(message.tokens) % 4 or not 0 < message.prompt_len <= count:
            return "invalid", "the prompt is empty or its length does not fit its token ids"
        if count >= self._context:
            return "invalid", f"the prompt has {count} tokens, the model's context is {self._context}"
        if len(self.running) >= self._max_open:
            return "overload", f"the worker has {self._max_open} requests open already"
        return None

    def cancel(self, connection: bytes, requests: Iterable[tuple[int, int]]) -> list[int]:
        """The keys to abort."""
        known = self.connections.get(connection)
        if known is None:
            return []
        keys = []
        for rid, attempt in requests:
            running = known.open.get(rid)
            if running is not None and running.attempt == attempt:
                keys.append(self._forget(running))
        return keys

    def outputs(self, outputs: Iterable[Output]) -> None:
        """Take in one step's outputs; those of aborted sequences are dropped."""
        running_by_key, due = self.running, self._due
        for output in outputs:
            running = running_by_key.get(output.key)
            if running is None or running.finish:
                continue
            if output.finish == "invalid":
                self._forget(running)
                self.refused.append((running, output.detail))
                continue
            if not running.started:
                running.started = True
                self.started.append((output.key, output.cached))
            running.held += output.tokens
            if output.finish:
                running.finish = output.finish
                self._ended += 1
                if running.whole:
                    running.waiting = False
            if output.cached:
                running.cached = output.cached
            if output.logprobs:
                running.logprobs = (*running.logprobs, *output.logprobs)
            if not running.waiting:
                running.waiting = True
                due.append(running)

    def handed_over(self, key: int) -> Running | None:
        """The engine has computed a prompt to hand over: the request ends with that. None if it was cancelled."""
        running = self.running.get(key)
        if running is not None:
            self._forget(running)
        return running

    @property
    def due(self) -> bool:
        """There is something to take."""
        return bool(self._due)

    @property
    def generating(self) -> int:
        """Requests whose last token has not come in."""
        return len(self.running) - self._ended

    def take(self, pack_logprobs: Callable[[Logprobs], bytes], held_back: bool = False) -> dict[bytes, list[Row]]:
        """What is due, by connection, as the rows of its Tokens message. What has finished is forgotten with this.

        ``held_back``: also of whole answers; a few times a second, so that little is lost with this worker.
        """
        due, self._due = self._due, []
        if held_back:
            due += [running for running in self.running.values() if running.whole and running.held]
        by_connection: dict[bytes, list[Row]] = {}
        for running in due:
            tokens, finish = tuple(running.held), running.finish
            if running.key not in self.running or not (tokens or finish):
                continue  # cancelled, or taken a moment ago
            offset, logprobs = running.offset, running.logprobs
            running.offset = offset + len(tokens)
            self.tokens += len(tokens)
            running.held.clear()
            row = (running.rid, running.attempt, offset, tokens, finish, running.cached,
                   pack_logprobs(logprobs) if logprobs else b"")  # fmt: skip
            by_connection.setdefault(running.connection, []).append(row)
            if finish:
                self._forget(running)
            else:
                running.waiting = running.whole
                running.cached, running.logprobs = 0, ()
        return by_connection

    def gone(self, connection: bytes) -> list[int]:
        """The connection is closed: the keys to abort."""
        known = self.connections.get(connection)
        if known is None:
            return []
        keys = [self._forget(running) for running in list(known.open.values())]
        del self.connections[connection]
        return keys

    def orphans(self, silent_since: float) -> list[int]:
        """Forget connections not heard of since then: the keys to abort."""
        silent = [c for c, known in self.connections.items() if known.heard < silent_since]
        return [key for connection in silent for key in self.gone(connection)]

    def requests(self) -> dict[bytes, tuple[tuple[int, int], ...]]:
        """Every open (rid, attempt), by connection."""
        return {
            connection: tuple((one.rid, one.attempt) for one in known.open.values())
            for connection, known in self.connections.items()
            if known.open
        }

    def all_failed(self) -> list[Running]:
        """None goes on here: every request, forgotten. Take what is due before."""
        running = list(self.running.values())
        for one in running:
            self._forget(one)
        return running

    def _forget(self, running: Running) -> int:
        self._ended -= bool(running.finish)
        del self.running[running.key]
        del self.connections[running.connection].open[running.rid]
        return running.key
