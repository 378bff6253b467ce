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


def step(served: Served, *outputs: Output) -> dict[bytes, list[Row]]:
    served.outputs(outputs)
    return served.take(lambda given: repr(given).encode())


def test_outputs_go_back_to_their_connection_with_offsets() -> None:
    served = make()
    first = admit(served, ONE, generate(1))
    second = admit(served, TWO, generate(1, tokens=6))
    assert step(served, Output(first.key, (7,), cached=4), Output(second.key, (8,), "stop"), Output(99, (1,))) == {
        ONE: [(1, 0, 0, (7,), "", 4, b"")],
        TWO: [(1, 0, 2, (8,), "stop", 0, b"")],  # two tokens came from an earlier attempt
    }
    assert served.tokens == 2
    assert list(served.running) == [first.key]
    logprobs = ((-0.5, ()),)
    (row,) = step(served, Output(first.key, (9,), logprobs=logprobs))[ONE]
    assert row[2:] == (1, (9,), "", 0, repr(logprobs).encode())


def test_steps_between_two_takes_are_one_row_a_request() -> None:
    served = make()
    first, second = admit(served, ONE, generate(1)), admit(served, ONE, generate(2))
    a, b = (-0.5, ()), (-0.25, ())
    served.outputs([Output(first.key, (7,), cached=4, logprobs=(a,))])
    served.outputs([Output(first.key, (8,), logprobs=(b,)), Output(second.key, (9,))])
    assert served.due
    assert step(served, Output(second.key, (10,), "length")) == {
        ONE: [(1, 0, 0, (7, 8), "", 4, repr((a, b)).encode()), (2, 0, 0, (9, 10), "length", 0, b"")]
    }
    assert not served.due
    assert step(served, Output(first.key, (11,))) == {ONE: [(1, 0, 2, (11,), "", 0, b"")]}


def test_what_the_engine_refuses_is_forgotten_and_told_apart() -> None:
    served = make()
    bad, fine = admit(served, ONE, generate(1)), admit(served, ONE, generate(2))
    rows = step(served, Output(bad.key, (), "invalid", detail="no such grammar"), Output(fine.key, (7,)))
    assert rows == {ONE: [(2, 0, 0, (7,), "", 0, b"")]}
    assert [(running.rid, why) for running, why in served.refused] == [(1, "no such grammar")]
    assert list(served.running) == [fine.key]


def test_a_request_is_open_until_its_last_row_is_taken() -> None:
    served = make()
    sequence = admit(served, ONE, generate(1))
    served.outputs([Output(sequence.key, (7,), "stop")])
    assert list(served.connections[ONE].open) == [1]  # what a heartbeat names
    assert served.generating == 0
    assert served.take(repr) == {ONE: [(1, 0, 0, (7,), "stop", 0, b"")]}  # type: ignore[arg-type]
    assert not served.connections[ONE].open
    assert not served.running


@pytest.mark.parametrize("finish", ["", "stop"])
def test_what_was_not_taken_goes_with_a_cancel_and_with_the_connection(finish: str) -> None:
    served = make()
    first, second = admit(served, ONE, generate(1)), admit(served, TWO, generate(1))
    served.outputs([Output(key, (7,), finish) for key in (first.key, second.key)])
    assert served.cancel(ONE, [(1, 0)]) == [first.key]
    assert served.gone(TWO) == [second.key]
    assert served.take(lambda given: b"") == {}
    assert served.generating == len(served.running) == 0


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
    assert step(served, Output(sequence.key, (7,))) == {}


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

    def rows(*tokens: int, finish: str = "") -> list[Row]:
        return step(served, Output(sequence.key, tokens, finish)).get(ONE, [])

    assert rows(10) == [(1, 0, 2, (10,), "", 0, b"")]
    assert rows(11) == rows(12) == []
    assert served.take(lambda given: b"", held_back=True) == {ONE: [(1, 0, 3, (11, 12), "", 0, b"")]}
    assert served.take(lambda given: b"", held_back=True) == {}
    assert rows(13) == []
    assert rows(14, finish="length") == [(1, 0, 5, (13, 14), "length", 0, b"")]
    assert served.tokens == 5
    assert not served.running


def test_a_whole_answer_that_is_done_before_its_first_take_is_one_row() -> None:
    served = make()
    sequence = admit(served, ONE, replace(generate(1), whole=True))
    served.outputs([Output(sequence.key, (7,))])
    assert step(served, Output(sequence.key, (8,), "stop")) == {ONE: [(1, 0, 0, (7, 8), "stop", 0, b"")]}
    assert not served.due


def test_what_is_held_back_goes_with_a_cancel() -> None:
    served = make()
    sequence = admit(served, ONE, replace(generate(1), whole=True))
    for token in (10, 11):
        step(served, Output(sequence.key, (token,)))
    served.cancel(ONE, [(1, 0)])
    assert served.take(lambda given: b"", held_back=True) == {}
