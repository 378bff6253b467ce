"""`p2pdyn chat` against an endpoint that answers as ours does, or breaks in ways ours should not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.nodes import wait_for

WORKER = "00112233aabbccdd"


class Endpoint(BaseHTTPRequestHandler):
    """Echoes the conversation's user messages, a word an event; special words break the answer."""

    server: Server

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer(200, {"data": [{"id": name} for name in self.server.models]})
        else:
            self.answer(200, {"peers": [{"id": WORKER, "name": "w1"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.headers.get("authorization"), body))
        text = " | ".join(m["content"] for m in body["messages"] if m["role"] == "user")
        if "reject" in text:
            return self.answer(503, {"error": {"message": "no ready worker", "code": "no_ready_worker"}})
        self.send_response(200)
        self.send_header("x-p2pdyn-worker", WORKER)
        self.end_headers()
        for word in re.findall(r"\S+\s*", text):
            self.event({"choices": [{"delta": {"content": word}, "finish_reason": None}]})
        if "break" in text:
            return None
        if "hang" in text:
            self.server.hanging.set()
            self.server.release.wait(10)
        if "lose" in text:
            return self.event({"error": {"message": "worker lost", "code": "worker_lost"}})
        self.event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None})
        facts = {"workers": [WORKER], "migrations": 0}
        self.event({"choices": [], "usage": {"completion_tokens": 7}, "p2pdyn": facts})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def event(self, value: object) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.models = ["first", "second"]
        self.requests: list[tuple[str | None, Any]] = []
        self.hanging = threading.Event()
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield one
        one.release.set()
        one.shutdown()
        thread.join()


def chat(server: Server, text: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "p2pdyn", "chat", "--at", server.url, *args],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_piped_answers_go_to_stdout_and_the_worker_to_stderr(server: Server) -> None:
    done = chat(server, "hello there\n")
    assert (done.returncode, done.stdout) == (0, "hello there\n")
    assert re.search(r"\[answered by w1 \(00112233aabbccdd\), 7 tokens in \d+\.\d s\]", done.stderr)
    assert server.requests[0][1]["model"] == "first"


def test_the_conversation_is_kept_until_reset(server: Server) -> None:
    done = chat(server, "one\n\ntwo\n/reset\nthree\n/quit\nnever\n")
    assert done.stdout.splitlines() == ["one", "one | two", "three"]
    assert [m["role"] for m in server.requests[1][1]["messages"]] == ["user", "assistant", "user"]


def test_the_model_is_chosen_and_changed(server: Server) -> None:
    done = chat(server, "a\n/model first\nb\n", "--model", "second")
    assert [body["model"] for _, body in server.requests] == ["second", "first"]
    assert "first (in use), second" in done.stderr
    done = chat(server, "/model third\n")
    assert (done.returncode, done.stderr) == (1, "p2pdyn: no model third here: give one of first, second\n")


def test_the_api_key_comes_from_a_file(server: Server, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# lab\n\nsecret-1\nsecret-2\n")
    chat(server, "hi\n", "--api-key-file", str(keys))
    assert server.requests[0][0] == "Bearer secret-1"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("reject", "answers 503: no ready worker"),
        ("break", "the answer broke off before its end"),
        ("lose", "the answer broke off: worker lost"),
    ],
)
def test_a_broken_answer_is_a_failure_not_an_answer(server: Server, text: str, sentence: str) -> None:
    done = chat(server, f"{text}\n")
    assert done.returncode == 1
    assert sentence in done.stderr


def test_no_model_yet(server: Server) -> None:
    server.models = []
    done = chat(server, "hi\n")
    assert done.returncode == 1
    assert "knows no model yet" in done.stderr


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, server: Server, home: Path) -> None:
        self.fd, inner = os.openpty()
        code = (
            "import os, sys; os.login_tty(int(sys.argv[1])); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(inner), "-m", "p2pdyn", "chat", "--at", server.url],
            env={**os.environ, "HOME": str(home), "TERM": "dumb"},
            pass_fds=[inner],
            start_new_session=True,
        )
        os.close(inner)
        self.text = ""
        os.set_blocking(self.fd, False)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, text: str) -> None:
        """Wait for ``text`` and forget the output up to it."""
        wait_for(lambda: self.read() and text in self.text, 10, f"{text!r} in {self.text!r}")
        self.text = self.text.partition(text)[2]

    def read(self) -> bool:
        with contextlib.suppress(OSError):
            self.text += os.read(self.fd, 65536).decode()
        return True

    def end(self) -> int:
        code = self.process.wait(10)
        os.close(self.fd)
        return code


def test_interactive_session(server: Server, tmp_path: Path) -> None:
    terminal = Terminal(server, tmp_path)
    terminal.expect("first at http://127.0.0.1")
    terminal.expect("> ")
    terminal.type("reject\n")
    terminal.expect("no ready worker")
    terminal.expect("> ")
    terminal.type("hang please\n")
    assert server.hanging.wait(10)
    terminal.expect("hang please\r\n")
    terminal.expect("hang please")
    terminal.process.send_signal(signal.SIGINT)
    terminal.expect("stopped]")
    terminal.expect("> ")
    terminal.type("/quit\n")
    assert terminal.end() == 0
    assert (tmp_path / ".local/share/p2pdyn/chat_history").read_text().splitlines()[-2:] == ["hang please", "/quit"]


def test_ctrl_c_at_the_prompt_is_130_and_the_end_of_input_is_0(server: Server, tmp_path: Path) -> None:
    terminal = Terminal(server, tmp_path)
    terminal.expect("> ")
    terminal.type("\x03")
    assert terminal.end() == 130
    terminal = Terminal(server, tmp_path)
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
