"""The worker's open requests: admission, cancellation, and what goes back to whom."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from p2pdyn.core.served import Running, Served
from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import Output, Sequence
from p2pdyn.wire.requests import Generate, Refused, Row

EPOCH = 5
ONE, TWO = b"\x00one", b"\x00two"


def make(max_open: int = 8) -> Served:
    return Served(EPOCH, ["m"], context=16, max_open=max_open)


def generate(
    rid: int = 1, attempt: int = 0, epoch: int = EPOCH, model: str = "m", tokens: int = 4, prompt: int = 4
) -> Generate:
    return Generate(rid, attempt, epoch, model, prompt, array("I", range(tokens)).tobytes(), b"")


def admit(served: Served, connection: bytes, message: Generate) -> Sequence:
    sequence, refused, _ = served.admit(connection, message, SamplingParams(), 0.0)
    assert refused is None
    assert sequence is not None
    return sequence


def test_outputs_go_back_to_their_connection_with_offsets() -> None:
    served = make()
    first = admit(served, ONE, generate(1))
    second = admit(served, TWO, generate(1, tokens=6))
    step = [Output(first.key, (7,), cached=4), Output(second.key, (8,), "stop"), Output(99, (1,))]
    assert served.outputs(step, repr) == {  # type: ignore[arg-type]
        ONE: [(1, 0, 0, (7,), "", 4, b"")],
        TWO: [(1, 0, 2, (8,), "stop", 0, b"")],  # two tokens came from an earlier attempt
    }
    assert served.tokens == 2
    assert list(served.running) == [first.key]
    logprobs = ((-0.5, ()),)
    (row,) = served.outputs([Output(first.key, (9,), logprobs=logprobs)], lambda given: repr(given).encode())[ONE]
    assert row[2:] == (1, (9,), "", 0, repr(logprobs).encode())


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (generate(epoch=EPOCH - 1), "epoch"),
        (generate(model="other"), "model"),
        (generate(tokens=16, prompt=16), "invalid"),
        (generate(tokens=4, prompt=5), "invalid"),
        (generate(tokens=0, prompt=0), "invalid"),
        (Generate(1, 0, EPOCH, "m", 1, b"abc", b""), "invalid"),
    ],
)
def test_what_will_not_run_is_refused(message: Generate, code: str) -> None:
    served = make()
    sequence, refused, aborts = served.admit(ONE, message, SamplingParams(), 0.0)
    assert (sequence, aborts) == (None, [])
    assert refused is not None
    assert refused.code == code
    assert not served.running


def test_draining_and_full_workers_refuse() -> None:
    served = make(max_open=1)
    admit(served, ONE, generate(1))
    assert _code(served, generate(2)) == "overload"
    served.draining = True
    assert _code(served, generate(3)) == "draining"


def _code(served: Served, message: Generate) -> str:
    _, refused, _ = served.admit(ONE, message, SamplingParams(), 0.0)
    assert isinstance(refused, Refused)
    return refused.code


def test_newer_attempt_replaces_the_older_and_a_repeat_is_ignored() -> None:
    served = make()
    old = admit(served, ONE, generate(1, attempt=0))
    sequence, refused, aborts = served.admit(ONE, generate(1, attempt=1), SamplingParams(), 0.0)
    assert (refused, aborts) == (None, [old.key])
    assert sequence is not None
    assert served.admit(ONE, generate(1, attempt=1), SamplingParams(), 0.0) == (None, None, [])
    assert served.admit(ONE, generate(1, attempt=0), SamplingParams(), 0.0) == (None, None, [])
    assert list(served.running) == [sequence.key]


def test_cancel_needs_the_connection_and_the_attempt() -> None:
    served = make()
    sequence = admit(served, ONE, generate(1, attempt=1))
    assert served.cancel(TWO, [(1, 1)]) == []
    assert served.cancel(ONE, [(1, 0), (2, 1)]) == []
    assert served.cancel(ONE, [(1, 1)]) == [sequence.key]
    assert served.outputs([Output(sequence.key, (7,))], lambda given: b"") == {}


def test_silent_and_closed_connections_lose_their_requests() -> None:
    served = make()
    served.hello(ONE, "f1", 0.0)
    served.hello(TWO, "f2", 0.0)
    first = admit(served, ONE, generate(1))
    second = admit(served, TWO, generate(1))
    served.hello(TWO, "f2", 5.0)
    assert served.orphans(silent_since=1.0) == [first.key]
    assert served.gone(TWO) == [second.key]
    assert not served.running
    assert not served.connections


def test_engine_death_fails_everything_once() -> None:
    served = make()
    keys = {admit(served, ONE, generate(1)).key, admit(served, TWO, generate(2)).key}
    failed = served.all_failed()
    assert {running.key for running in failed} == keys
    assert all(isinstance(running, Running) for running in failed)
    assert served.all_failed() == []


def test_tokens_of_a_whole_answer_are_held_between_the_first_and_the_last() -> None:
    served = make()
    sequence = admit(served, ONE, replace(generate(1, tokens=6), whole=True))

    def step(*tokens: int, finish: str = "") -> list[Row]:
        return served.outputs([Output(sequence.key, tokens, finish)], lambda given: b"").get(ONE, [])

    assert step(10) == [(1, 0, 2, (10,), "", 0, b"")]
    assert step(11) == step(12) == []
    assert served.held() == {ONE: [(1, 0, 3, (11, 12), "", 0, b"")]}
    assert served.held() == {}
    assert step(13) == []
    assert step(14, finish="length") == [(1, 0, 5, (13, 14), "length", 0, b"")]
    assert served.tokens == 5
    assert not served.running


def test_what_is_held_goes_with_a_cancel() -> None:
    served = make()
    sequence = admit(served, ONE, replace(generate(1), whole=True))
    for token in (10, 11):
        served.outputs([Output(sequence.key, (token,))], lambda given: b"")
    served.cancel(ONE, [(1, 0)])
    assert served.held() == {}
