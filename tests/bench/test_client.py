"""The bench compares like with like: a side that merges tokens, drops some or reports another usage is refused."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"
Serve = Callable[[bytes], str]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("client")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that answers every POST with the given event stream; gives its URL."""
    with ExitStack() as stack:

        def start(reply: bytes) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    self.rfile.read(int(self.headers["Content-Length"]))
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(reply)

                def log_message(self, *arguments: object) -> None:
                    pass

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


def stream(texts: list[str], completion_tokens: int) -> bytes:
    events: list[dict[str, object]] = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    usage = {"prompt_tokens": 9, "completion_tokens": completion_tokens, "total_tokens": 9 + completion_tokens}
    events.append({"choices": [], "usage": usage})
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def test_one_event_a_token_passes_and_gives_usage(client: ModuleType, serve: Serve) -> None:
    load = client.Load("x", stream=True, tokens=3, words=5, connections=1)

    found = client.check(serve(stream(["a", "b", "c"], 3)), load, 1)

    assert (found["prompt_tokens"], found["completion_tokens"]) == (9, 3)


@pytest.mark.parametrize(
    ("texts", "counted"),
    [
        pytest.param(["ab", "c"], 3, id="two tokens in one event"),
        pytest.param(["a", "b"], 2, id="too few tokens"),
        pytest.param(["a", "b", "c"], 2, id="usage of another count"),
        pytest.param(["a", "b", "c", "d"], 3, id="too many events"),
    ],
)
def test_unlike_streams_are_refused(client: ModuleType, serve: Serve, texts: list[str], counted: int) -> None:
    load = client.Load("x", stream=True, tokens=3, words=5, connections=1)
    url = serve(stream(texts, counted))

    with pytest.raises(client.CheckFailed):
        client.check(url, load, 1)


def test_time_to_first_token_needs_a_token(client: ModuleType, serve: Serve) -> None:
    url = serve(stream([""], 0))

    with pytest.raises(client.CheckFailed, match="without a token"):
        client.ttft(url, 1, 1)


def test_prompts_differ_in_their_first_word_and_are_the_same_for_both_sides(client: ModuleType) -> None:
    load = client.LOADS[1]

    made = client.bodies(load, count=3)

    assert made == client.bodies(load, count=3)
    for body in made:
        words = json.loads(body)["messages"][0]["content"].split()
        assert (words[0], len(words)) == ("00000000", load.words)
        assert body.count("00000000") == 1
