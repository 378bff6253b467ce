"""Frames between a peer and its engine-host child: a u32 length (little-endian), then msgpack.

Both ends are ours and of one version, so this is laid out for speed, not for strangers; sizes and shapes are still
checked, and a frame that does not fit its shape counts as the death of the engine.  docs/design/engine-host.md lists
the frames.

In a step nearly every output is one token and nothing else.  Those travel as two flat arrays (keys, tokens); only what
says more (a finish, logprobs, a cache hit, several tokens) has a row of its own.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Container, Iterator
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import msgpack

from p2pdyn.core.types import Load, SamplingParams
from p2pdyn.engines.base import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    EngineInfo,
    EngineOptions,
    Held,
    KvEvent,
    Output,
    Pin,
    Release,
    Reserved,
    Sequence,
    Settle,
    Step,
    TransferNote,
    TransferOrder,
)

MAX_FRAME = 256 * 2**20
"""Bytes: a model card (at most 65 MB) and a prompt (16 MB) fit; more is a broken child."""

STEP, LOAD, PROGRESS, READY, FAILED = range(5)
"""Kinds of frame from the child, the first item of each."""

_LENGTH = struct.Struct("<I")
_LOAD_FIELDS = tuple(item.name for item in fields(Load))
_PARAM_DEFAULTS = tuple((item, getattr(SamplingParams(), item)) for item in SamplingParams.__slots__)


class FrameError(ValueError):
    """Bytes that are not a frame of ours."""


def frame(content: object) -> bytes:
    """``content`` as msgpack behind its length."""
    body: bytes = msgpack.packb(content)
    if len(body) > MAX_FRAME:
        raise FrameError(f"a frame of {len(body)} bytes is larger than {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a byte stream into frames."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The contents of every frame that is complete with ``data``. Raises FrameError; then the stream is lost."""
        source: bytes | bytearray = data
        if self._rest:
            self._rest += data
            source = self._rest
        start, total = 0, len(source)
        with memoryview(source) as view:
            while total - start >= 4:
                (size,) = _LENGTH.unpack_from(view, start)
                if size > MAX_FRAME:
                    raise FrameError(f"a frame of {size} bytes is larger than {MAX_FRAME}")
                end = start + 4 + size
                if end > total:
                    break
                try:
                    content = msgpack.unpackb(view[start + 4 : end], strict_map_key=False)
                except Exception as error:  # msgpack raises several unrelated classes
                    raise FrameError("a frame is not valid msgpack") from error
                start = end
                yield content
        if source is data:
            self._rest += data[start:]
        else:
            del self._rest[:start]


# ---- to the child


def pack_options(name: str, module: str, options: EngineOptions, parent: int) -> list[Any]:
    """The first frame: which engine, from what, and the peer's process id."""
    return [
        name,
        module,
        parent,
        options.model,
        options.served_name,
        list(options.args),
        options.offline,
        str(options.data_dir),
        options.node,
        options.epoch,
        options.role,
        options.host,
        options.side_port,
        options.kv_memory,
    ]


def unpack_options(content: list[Any]) -> tuple[str, str, int, EngineOptions]:
    """(name, module, the peer's process id, options)."""
    name, module, parent, model, served_name, args, offline, data_dir, *peer = content
    return name, module, parent, EngineOptions(model, served_name, tuple(args), offline, Path(data_dir), *peer)


def pack_sequence(sequence: Sequence) -> list[Any]:
    """A submit; an abort is just its key."""
    params = sequence.params
    plain = {name: value for name, default in _PARAM_DEFAULTS if (value := getattr(params, name)) != default}
    return [
        sequence.key,
        sequence.tokens.tobytes(),
        sequence.prompt_len,
        plain,
        sequence.traceparent,
        sequence.rank,
        sequence.hand_over,
        sequence.pull,
        sequence.remote,
    ]


def unpack_sequence(item: list[Any]) -> Sequence:
    key, data, prompt_len, plain, *more = item
    params = SamplingParams(**plain)
    params.stop_token_ids = tuple(params.stop_token_ids)
    tokens = array("I")
    tokens.frombytes(data)
    return Sequence(key, tokens, prompt_len, params, *more)


def pack_order(order: TransferOrder) -> list[Any]:
    """Told from a submit by its first item, a name."""
    match order:
        case Pin(key, keys):
            return ["pin", key, keys]
        case Release(key):
            return ["release", key]
        case Settle(key, filled, over):
            return ["settle", key, filled, over]


def unpack_order(item: list[Any]) -> TransferOrder:
    match item:
        case ["pin", int(key), list(keys)]:
            return Pin(key, tuple(keys))
        case ["release", int(key)]:
            return Release(key)
        case ["settle", int(key), int(filled), bool(over)]:
            return Settle(key, filled, over)
    raise FrameError("an order has a wrong shape")


# ---- to the peer


def pack_load(load: Load) -> list[Any]:
    return [getattr(load, name) for name in _LOAD_FIELDS]


def unpack_load(row: list[Any]) -> Load:
    try:
        return Load(*row)
    except TypeError as error:
        raise FrameError("a load has a wrong shape") from error


def pack_step(step: Step, load: Load) -> list[Any]:
    keys: list[int] = []
    tokens: list[int] = []
    rows: list[list[Any]] = []
    for output in step.outputs:
        if len(output.tokens) == 1 and not (output.finish or output.cached or output.logprobs):
            keys.append(output.key)
            tokens.append(output.tokens[0])
        else:
            rows.append(
                [output.key, output.tokens, output.finish, output.cached, output.logprobs, output.detail],
            )
    kv, notes = [_pack_kv(event) for event in step.kv], [_pack_note(note) for note in step.transfers]
    return [STEP, keys, tokens, rows, kv, notes, pack_load(load)]


def unpack_step(content: list[Any], known: Container[int]) -> Step:
    """The step without outputs for keys that are not in ``known``: those were aborted while it was under way."""
    try:
        _, keys, tokens, rows, kv, notes, _ = content
        outputs = [Output(key, (token,)) for key, token in zip(keys, tokens, strict=True) if key in known]
        for key, several, finish, cached, logprobs, detail in rows:
            if key in known:
                outputs.append(Output(key, tuple(several), finish, cached, _tuples(logprobs), detail))
        return Step(outputs, [_unpack_kv(event) for event in kv], [_unpack_note(row) for row in notes])
    except (TypeError, ValueError) as error:
        raise FrameError("a step has a wrong shape") from error


def _tuples(logprobs: list[Any]) -> tuple[tuple[float, tuple[tuple[int, float], ...]], ...]:
    return tuple((chosen, tuple((token, value) for token, value in others)) for chosen, others in logprobs)


def _pack_kv(event: KvEvent) -> list[Any]:
    if isinstance(event, BlocksStored):
        return [event.hashes, event.parent, event.tokens, event.salt, event.lora, event.tier]
    return [event.hashes, event.tier] if isinstance(event, BlocksRemoved) else []


def _unpack_kv(row: list[Any]) -> KvEvent:
    if not row:
        return BlocksCleared()
    if len(row) == 2:
        hashes, tier = row
        return BlocksRemoved(tuple(hashes), tier)
    hashes, parent, tokens, salt, lora, tier = row
    return BlocksStored(tuple(hashes), parent, tuple(tokens), salt, lora, tier)


def _pack_note(note: TransferNote) -> list[Any]:
    if isinstance(note, Held):
        return [note.key, note.blocks, note.generations, note.keys, note.cached, note.params, note.computed]
    return [note.key, note.first, note.blocks, note.keys]


def _unpack_note(row: list[Any]) -> TransferNote:
    match row:
        case [int(key), list(blocks), list(generations), list(keys), int(cached), bytes(params), bool(computed)]:
            if len(blocks) == len(generations) == len(keys):
                return Held(key, tuple(blocks), tuple(generations), tuple(keys), cached, params, computed)
        case [int(key), int(first), list(blocks), list(keys)]:
            if len(blocks) == len(keys):
                return Reserved(key, first, tuple(blocks), tuple(keys))
    raise ValueError("a transfer note has a wrong shape")


def pack_info(info: EngineInfo) -> list[Any]:
    return [READY, *astuple(info)]


def unpack_info(content: list[Any]) -> EngineInfo:
    try:
        _, *plain = content
        info = EngineInfo(*plain)
        publishers = tuple((str(events), str(replay), str(topic)) for events, replay, topic in info.publishers)
        return replace(info, features=tuple(info.features), publishers=publishers)
    except (TypeError, ValueError) as error:
        raise FrameError("the engine's description has a wrong shape") from error
