"""The two shapes of answers: chat.completion and text_completion, streamed and whole.

A streamed token is ``head + JSON-escaped text + tail``; head and tail are made once a choice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson

from p2pdyn.text.tokenizer import Tokenizer

Row = tuple[float, Sequence[tuple[int, float]]]
DONE = b"data: [DONE]\n\n"


def escaped(text: str) -> bytes:
    """The text as it stands between the quotes of a JSON string."""
    return orjson.dumps(text)[1:-1]


def event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(content)


class Format:
    """What chat and completions share. ``model`` is the name that the client asked for."""

    object = ""
    chunk_object = ""
    prefix = ""
    middle = b""

    def __init__(self, name: str, model: str, tokenizer: Tokenizer, stream: bool, usage_null: bool) -> None:
        self.tokenizer = tokenizer
        self.base: dict[str, Any] = {"id": self.prefix + name, "created": int(time.time()), "model": model}
        if stream:
            self._open = orjson.dumps({**self.base, "object": self.chunk_object})[:-1]
            self._nothing = {"usage": None} if usage_null else {}
            self.end = b',"finish_reason":null}]%b}\n\n' % (b',"usage":null' if usage_null else b"")
            self.tail = self.middle + b"null" + self.end
            """What stands behind a token without logprobs."""

    def _chunk_head(self, index: int) -> bytes:
        return b'data: %b,"choices":[{"index":%d,' % (self._open, index)

    def chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        """A whole event of the stream."""
        return event({**self.base, "object": self.chunk_object, "choices": choices, **self._nothing, **more})

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any], facts: dict[str, Any]) -> bytes:
        """The body of an answer that is not streamed."""
        body = {**self.base, "object": self.object, "choices": choices, "usage": usage, "p2pdyn": facts}
        return orjson.dumps(body)

    def token_text(self, token: int) -> tuple[str, bytes]:
        data = self.tokenizer.token_bytes(token)
        return data.decode("utf-8", "replace"), data


class ChatFormat(Format):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl-"
    middle = b'"},"logprobs":'

    def heads(self, index: int) -> tuple[bytes, bytes]:
        """What stands before the text of the first token, and of each other one."""
        start = self._chunk_head(index)
        return start + b'"delta":{"role":"assistant","content":"', start + b'"delta":{"content":"'

    def finish(self, index: int, text: str, reason: str, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def choice(self, index: int, text: str, reason: str, entries: list[Any] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = None if entries is None else {"content": entries, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def entry(self, token: int, row: Row, offset: int) -> dict[str, Any]:
        """One token's logprobs; ``offset`` (of its text in characters) is for completions."""
        tops = [self._token(alternative, logprob) for alternative, logprob in row[1]]
        return {**self._token(token, row[0]), "top_logprobs": tops}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    def logprobs(self, entries: list[dict[str, Any]]) -> bytes:
        return orjson.dumps({"content": entries, "refusal": None})


class CompletionFormat(Format):
    object = chunk_object = "text_completion"
    prefix = "cmpl-"
    middle = b'","logprobs":'

    def heads(self, index: int) -> tuple[bytes, bytes]:
        start = self._chunk_head(index) + b'"text":"'
        return start, start

    def finish(self, index: int, text: str, reason: str, first: bool) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def choice(self, index: int, text: str, reason: str, entries: list[Any] | None) -> dict[str, Any]:
        logprobs = None if entries is None else self._columns(entries)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def entry(self, token: int, row: Row, offset: int) -> dict[str, Any]:
        tops = {self.token_text(alternative)[0]: logprob for alternative, logprob in row[1]}
        return {"token": self.token_text(token)[0], "logprob": row[0], "top": tops, "offset": offset}

    def logprobs(self, entries: list[dict[str, Any]]) -> bytes:
        return orjson.dumps(self._columns(entries))

    @staticmethod
    def _columns(entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [entry["top"] for entry in entries],
            "text_offset": [entry["offset"] for entry in entries],
        }


Shape = ChatFormat | CompletionFormat
