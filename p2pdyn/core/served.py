"""Every open request of one worker: whose it is, and what goes back to whom.

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
    """Of the next token to send: generated tokens so far, those of earlier attempts included."""
    held: list[int] | None = None
    """Tokens not sent yet, of a request whose first token has been sent and whose client waits for the whole answer."""
    whole: bool = False


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
        """Sent so far."""
        self.draining = False
        self.connections: dict[bytes, Connection] = {}
        self.running: dict[int, Running] = {}

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
        return Sequence(running.key, tokens, message.prompt_len, params), None, aborts

    def _refusal(self, message: Generate) -> tuple[str, str] | None:
        count = len(message.tokens) // 4
        if message.epoch != self.epoch:
            return "epoch", f"the worker was restarted: it has epoch {self.epoch}, the request is for {message.epoch}"
        if self.draining:
            return "draining", "the worker is draining"
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

    def outputs(self, outputs: Iterable[Output], pack_logprobs: Callable[[Logprobs], bytes]) -> dict[bytes, list[Row]]:
        """One step's outputs by connection, as the rows of its Tokens message; what has finished is forgotten, outputs
        of aborted sequences are dropped."""
        by_connection: dict[bytes, list[Row]] = {}
        running_by_key = self.running
        total = 0
        for output in outputs:
            running = running_by_key.get(output.key)
            if running is None:
                continue
            tokens, finish, offset = output.tokens, output.finish, running.offset
            if running.whole:
                held = running.held
                if held is None:
                    running.held = []  # the first token goes at once: it tells how long the prompt took
                elif finish:
                    tokens = (*held, *tokens)
                else:
                    held += tokens
                    continue
            count = len(tokens)
            running.offset = offset + count
            total += count
            logprobs = pack_logprobs(output.logprobs) if output.logprobs else b""
            row = (running.rid, running.attempt, offset, tokens, finish, output.cached, logprobs)
            rows = by_connection.get(running.connection)
            if rows is None:
                by_connection[running.connection] = [row]
            else:
                rows.append(row)
            if finish:
                self._forget(running)
        self.tokens += total
        return by_connection

    def held(self) -> dict[bytes, list[Row]]:
        """What :meth:`outputs` has held back, as it gives it: a few times a second, so that little is lost with us."""
        by_connection: dict[bytes, list[Row]] = {}
        for running in self.running.values():
            if running.held:
                tokens, running.held = tuple(running.held), []
                row = (running.rid, running.attempt, running.offset, tokens, "", 0, b"")
                running.offset += len(tokens)
                self.tokens += len(tokens)
                by_connection.setdefault(running.connection, []).append(row)
        return by_connection

    def gone(self, connection: bytes) -> list[int]:
        """The connection is closed: the keys to abort."""
        known = self.connections.pop(connection, None)
        if known is None:
            return []
        for running in known.open.values():
            del self.running[running.key]
        return [running.key for running in known.open.values()]

    def orphans(self, silent_since: float) -> list[int]:
        """Forget connections not heard of since then: the keys to abort."""
        silent = [c for c, known in self.connections.items() if known.heard < silent_since]
        return [key for connection in silent for key in self.gone(connection)]

    def all_failed(self) -> list[Running]:
        """The engine died: every request, forgotten."""
        running = list(self.running.values())
        for one in running:
            self._forget(one)
        return running

    def _forget(self, running: Running) -> int:
        del self.running[running.key]
        del self.connections[running.connection].open[running.rid]
        return running.key
