"""A small client of the OpenAI endpoint on the standard library: what `chat` and `quickstart` need, cheap to import."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from p2pdyn.cli.errors import USAGE, Failure

CONNECT_S = 5.0
SILENCE_S = 120.0
"""Longest wait for the next bytes of an answer: a long prompt on a slow worker, then it is given up."""


@dataclass(slots=True)
class Reply:
    """Grows while :meth:`Client.chat` yields: the whole text, then who answered (ids in order) and the token count."""

    text: str = ""
    workers: tuple[str, ...] = ()
    migrations: int = 0
    tokens: int = 0
    finish: str = ""
    pieces: Generator[str, None, None] = field(init=False)


class Client:
    """One endpoint. Every method raises Failure with a sentence."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise Failure(f"{url!r} is not an endpoint: give http://HOST:PORT", USAGE)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"

    def models(self) -> list[str]:
        return [model["id"] for model in self.get("/v1/models")["data"]]

    def get(self, path: str) -> Any:
        with self._ask("GET", path, None) as response:
            return json.loads(response.read())

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **options: object) -> Reply:
        """Start an answer; iterate ``reply.pieces`` to stream it, close it to cancel."""
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        body["stream_options"] = {"include_usage": True}
        reply = Reply()
        reply.pieces = self._stream(body, reply)
        return reply

    def _stream(self, body: dict[str, object], reply: Reply) -> Generator[str, None, None]:
        with self._ask("POST", "/v1/chat/completions", body) as response:
            if worker := response.getheader("x-p2pdyn-worker"):
                reply.workers = (worker,)
            for event in _events(response):
                if "error" in event:
                    raise Failure(f"the answer broke off: {event['error'].get('message', event['error'])}")
                if facts := event.get("p2pdyn"):
                    reply.workers, reply.migrations = tuple(facts["workers"]), facts["migrations"]
                if usage := event.get("usage"):
                    reply.tokens = usage["completion_tokens"]
                for choice in event.get("choices", ()):
                    reply.finish = choice.get("finish_reason") or reply.finish
                    if piece := choice.get("delta", {}).get("content"):
                        reply.text += piece
                        yield piece

    @contextmanager
    def _ask(self, method: str, path: str, body: object) -> Iterator[http.client.HTTPResponse]:
        connection = self._connect()
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise Failure(f"{self.url}{path} answers {response.status}: {_message(response.read(65536))}")
            yield response
        except TimeoutError:
            raise Failure(f"{self.url} has been silent for {SILENCE_S:g} s: see `p2pdyn peers`") from None
        except (OSError, http.client.HTTPException) as error:
            raise Failure(
                f"the connection to {self.url} broke off ({error or type(error).__name__}): try again"
            ) from None
        except ValueError as error:
            raise Failure(f"{self.url} answers other than an OpenAI endpoint does ({error}): check --at URL") from None
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        if self._secure:
            context = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=CONNECT_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
        except OSError as error:
            raise Failure(
                f"no endpoint answers at {self.url} ({error}): start `p2pdyn node`, or give another one with --at URL"
            ) from None
        assert connection.sock is not None
        connection.sock.settimeout(SILENCE_S)
        return connection


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to [DONE]."""
    for line in response:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise Failure("the answer broke off before its end: ask again")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "no message"
