"""The simulated engine's model folder, read in a process of its own.

To parse a tokenizer.json of 10 MB takes half a second in one call that holds the interpreter, so that even in a thread
it would delay the peer's heartbeats, and the memory that it takes would not come back.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import msgpack

from p2pdyn.engines.base import EngineError
from p2pdyn.engines.sim_text import Vocabulary
from p2pdyn.text.card import CardError, ModelCard, byte_level, from_folder

FEATURES = ("logprobs", "min_p", "min_tokens", "penalties", "seed", "top_k")
READ_S = 120.0
"""Longest that the child may take; 10 MB take a second on a slow host."""


def read(model: str | None, context: int) -> tuple[bytes, Vocabulary]:
    """The packed card with ``context`` in tokens, and what to speak with. Blocks. Raises EngineError with the mend."""
    if model is None:
        card = byte_level(FEATURES, context)
        return card.pack(), Vocabulary.from_tokenizer(card.tokenizer_json)
    command = [sys.executable, "-m", "p2pdyn.engines.sim_model", model, str(context)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=READ_S, process_group=0, check=False
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"model folder {model} could not be read within {READ_S:g} s: is its disk slow?") from None
    if done.returncode:
        raise EngineError(f"the process that reads model folder {model} ended with code {done.returncode}: see above")
    error, packed, ring, first = msgpack.unpackb(done.stdout)
    if error:
        raise EngineError(error)
    return packed, Vocabulary(tuple(ring), tuple(first))


def _read_here(model: str, context: int) -> tuple[ModelCard, Vocabulary]:
    try:
        card = from_folder(model, FEATURES)
        return replace(card, context=context), Vocabulary.from_tokenizer(card.tokenizer_json)
    except CardError as error:
        raise EngineError(str(error)) from error
    except ValueError as error:
        raise EngineError(f"{error}: name another --model") from error


def main(model: str, context: int) -> None:
    """The child: one msgpack ``[error, packed card, ring, first]`` on stdout."""
    try:
        card, vocabulary = _read_here(model, context)
        answer = ["", card.pack(), vocabulary.ring, tuple(vocabulary.first)]
    except EngineError as error:
        answer = [str(error), b"", (), ()]
    sys.stdout.buffer.write(msgpack.packb(answer))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
