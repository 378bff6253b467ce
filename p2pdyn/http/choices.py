"""The sequences of an answer, each the Sink of one job: what they make of tokens.

The mesh calls them once a frame; nothing awaits.  Most choices are :class:`WholeChoice` or :class:`StreamedChoice`, for
which a token is an id in a list, or a dictionary look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from p2pdyn.core.request import Failure, Logprobs, Outcome
from p2pdyn.core.types import NodeId
from p2pdyn.http.formats import escaped
from p2pdyn.text.stops import StopMatcher

if TYPE_CHECKING:
    from p2pdyn.http.reply import Reply

GONE = Failure(503, "worker_lost", "The request was ended by the cluster before its end.", 1)


class Choice:
    """One sequence of the answer. ``index`` is its number in the answer, ``prompt`` that of its prompt, ``count`` and
    ``cached`` are tokens: made, and found in the prefix cache."""

    __slots__ = ("cached", "count", "ended", "finish", "index", "prompt", "reply", "ticket")

    def __init__(self, reply: Reply, index: int, prompt: int) -> None:
        self.reply = reply
        self.index, self.prompt = index, prompt
        self.ticket: int | None = None
        self.count = self.cached = 0
        self.ended, self.finish = False, ""

    def on_routed(self, worker: NodeId) -> None:
        workers = self.reply.workers
        if worker not in workers:
            workers.append(worker)

    def on_tokens(self, tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None:
        if self.ended:
            return
        if not self.count:
            self.cached = cached
            self.reply.first_token()
        self.push(tokens, logprobs)

    def on_end(self, outcome: Outcome) -> None:
        if self.ended:
            return
        self.reply.migrations += outcome.migrations
        if outcome.finish in ("stop", "length"):
            self.end(outcome.finish, self.rest())
        else:
            self.reply.fail(outcome.failure or GONE)

    def end(self, finish: str, rest: str) -> None:
        """``rest`` is text that belongs into the last event."""
        self.ended, self.finish = True, finish
        self.reply.choice_ended(self, rest)

    # What differs.

    def push(self, tokens: Sequence[int], logprobs: Logprobs) -> None:
        raise NotImplementedError

    def rest(self) -> str:
        """Text that only the end of the sequence sets free."""
        raise NotImplementedError

    def drain(self) -> None:
        """Streams: add the events that wait to the reply's output."""

    @property
    def unsaid(self) -> bool:
        """Streams: no event has been made yet."""
        return True

    def body(self) -> dict[str, Any]:
        """Whole answers: the choice, once it has ended."""
        raise NotImplementedError


class WholeChoice(Choice):
    """Not streamed, and nothing depends on single tokens: the text is made at the end."""

    __slots__ = ("_ids",)

    def __init__(self, reply: Reply, index: int, prompt: int) -> None:
        super().__init__(reply, index, prompt)
        self._ids: list[int] = []

    def push(self, tokens: Sequence[int], logprobs: Logprobs) -> None:
        self.count += len(tokens)
        self._ids += tokens

    def rest(self) -> str:
        return ""

    def body(self) -> dict[str, Any]:
        form = self.reply.form
        return form.choice(self.index, form.tokenizer.decode(self._ids), self.finish, None)


class StreamedChoice(Choice):
    """An event a token, ``head + JSON-escaped text + tail``, made when they are written."""

    __slots__ = ("_detokenizer", "_head", "_joint", "_next_head", "_tail", "_texts")

    def __init__(self, reply: Reply, index: int, prompt: int) -> None:
        super().__init__(reply, index, prompt)
        form = reply.form
        self._head, self._next_head = form.heads(index)
        self._tail = form.tail
        self._joint = self._tail + self._next_head
        self._texts: list[bytes] = []
        """Escaped, of tokens not yet made into events."""
        self._detokenizer = form.tokenizer.detokenizer()

    def push(self, tokens: Sequence[int], logprobs: Logprobs) -> None:
        self.count += len(tokens)
        reply, detokenizer, add = self.reply, self._detokenizer, self._texts.append
        known = reply.form.tokenizer.escaped
        for token in tokens:
            text = None if detokenizer.pending else known.get(token)
            add(escaped(detokenizer.push(token)) if text is None else text)
        reply.wait_for_flush()

    def drain(self) -> None:
        texts = self._texts
        if texts:
            self.reply.out.append(b"%b%b%b" % (self._head, self._joint.join(texts), self._tail))
            self._head = self._next_head
            texts.clear()

    def rest(self) -> str:
        return self._detokenizer.finish()

    @property
    def unsaid(self) -> bool:
        return self._head is not self._next_head and not self._texts


class CarefulChoice(Choice):
    """With stop strings, logprobs, echo, or ids that are counted but not shown; streamed or not."""

    __slots__ = (
        "_detokenizer",
        "_entries",
        "_events",
        "_heads",
        "_matcher",
        "_parts",
        "_said",
        "_silent",
        "_stream",
        "_written",
    )

    def __init__(self, reply: Reply, index: int, prompt: int, echo: str) -> None:
        super().__init__(reply, index, prompt)
        ask = reply.ask
        self._stream = ask.stream
        self._heads = reply.form.heads(index) if ask.stream else ()
        self._detokenizer = reply.form.tokenizer.detokenizer()
        self._matcher = StopMatcher(ask.stops) if ask.stops else None
        self._entries: list[dict[str, Any]] | None = None if ask.params.logprobs is None else []
        self._silent = reply.silent
        self._parts: list[str] = []
        self._events: list[bytes] = []
        self._written = 0
        self._said = False
        if echo:
            self._emit(echo, None)

    def push(self, tokens: Sequence[int], logprobs: Logprobs) -> None:
        reply = self.reply
        minimum, matcher = reply.ask.params.min_tokens, self._matcher
        for position, token in enumerate(tokens):
            self.count += 1
            text = "" if token in self._silent else self._detokenizer.push(token)
            entry = None
            if self._entries is not None and position < len(logprobs):
                entry = reply.form.entry(token, logprobs[position], self._written)
            if matcher is not None and self.count > minimum:
                text = matcher.push(text)
            self._emit(text, entry)
            if matcher is not None and matcher.found:
                reply.cancel_later(self)
                self.end("stop", "")
                return
        if self._stream:
            reply.wait_for_flush()

    def _emit(self, text: str, entry: dict[str, Any] | None) -> None:
        self._written += len(text)
        if not self._stream:
            self._parts.append(text)
            if entry is not None and self._entries is not None:
                self._entries.append(entry)
            return
        form = self.reply.form
        head = self._heads[self._said]
        self._said = True
        tail = form.tail if entry is None else form.middle + form.logprobs([entry]) + form.end
        self._events.append(b"%b%b%b" % (head, escaped(text), tail))

    def drain(self) -> None:
        self.reply.out += self._events
        self._events.clear()

    def rest(self) -> str:
        rest = self._detokenizer.finish()
        if self._matcher is not None:
            rest = self._matcher.push(rest)
            rest += self._matcher.finish()
        return rest

    def end(self, finish: str, rest: str) -> None:
        self._parts.append(rest)
        super().end(finish, rest)

    @property
    def unsaid(self) -> bool:
        return not self._said

    def body(self) -> dict[str, Any]:
        return self.reply.form.choice(self.index, "".join(self._parts), self.finish, self._entries)
