"""The codec: every message comes back as it was sent, and nothing else comes through."""

from __future__ import annotations

import math
import resource
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import messages as strategies

from p2pdyn.constants import PEER_INFO_MAX, PROTOCOL_VERSION
from p2pdyn.core.types import PeerInfo, SamplingParams
from p2pdyn.wire.codec import (
    LIMITS,
    FutureVersion,
    WireError,
    decode,
    decode_info,
    decode_logprobs,
    decode_params,
    encode,
    encode_info,
    encode_logprobs,
    encode_params,
    encode_tokens,
)
from p2pdyn.wire.control import Ping, Record
from p2pdyn.wire.events import LoadEvent
from p2pdyn.wire.header import Header
from p2pdyn.wire.requests import Cancel, Delta, Generate, Heartbeat, Hello, Tokens

VERSION = bytes([PROTOCOL_VERSION])
LOAD = LoadEvent("a" * 16, 1, 2, 3, 4, 5, 6, 7, 8, 9.0, 10.0)


def raw(*fields: Any) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return VERSION + packed


@settings(deadline=None, max_examples=300)
@given(strategies.messages)
def test_every_message_comes_back_as_it_was_sent(sent: tuple[str, Any]) -> None:
    link, message = sent
    data = encode(message)
    back = decode(link, data)
    assert back == message
    assert type(back) is type(message)
    assert encode(back) == data


@settings(deadline=None, max_examples=300)
@given(strategies.messages, st.data())
def test_a_cut_or_lengthened_message_is_refused(sent: tuple[str, Any], data: st.DataObject) -> None:
    link, message = sent
    whole = encode(message)
    for bad in (
        whole[: data.draw(st.integers(0, len(whole) - 1))],
        whole + data.draw(st.binary(min_size=1, max_size=9)),
    ):
        with pytest.raises(WireError):
            decode(link, bad)


@settings(deadline=None, max_examples=500)
@given(strategies.messages, st.data())
def test_changed_bytes_give_a_message_of_the_schema_or_a_wire_error(sent: tuple[str, Any], data: st.DataObject) -> None:
    link, message = sent
    changed = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = decode(link, bytes(changed))
    except WireError:
        return
    assert decode(link, encode(back)) == back  # encode checks the whole schema once more


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(sorted(LIMITS)), st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_raise_nothing_but_wire_errors(link: str, data: bytes, versioned: bool) -> None:
    for read in (lambda: decode(link, VERSION + data if versioned else data), lambda: decode_info(data),
                 lambda: decode_params(data), lambda: decode_logprobs(data)):  # fmt: skip
        with suppress(WireError):
            read()


@pytest.mark.parametrize(
    "fields",
    [
        (1, "a" * 16),  # a field missing
        (1, "a" * 16, 1, 1),  # one too many
        (1, b"a" * 16, 1),  # bytes for str
        (1, "a" * 17, 1),  # over its cap
        (1, "é" * 9, 1),  # the cap counts bytes
        (1, "a" * 16, True),  # a bool is no number
        (1, "a" * 16, -1),
        (1, "a" * 16, 1.0),
        (1, "a" * 16, None),
        (1, ["a"], 1),
        (99, "a" * 16, 1),  # unknown kind
        ("1", "a" * 16, 1),
        (True, "a" * 16, 1),
        (),
    ],
)
def test_a_wrong_field_is_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(WireError):
        decode("requests", raw(*fields))


def test_fields_added_at_the_end_are_sent_only_when_they_say_something() -> None:
    plain = Generate(1, 0, 2, "m", 1, b"\1\0\0\0", b"")
    fields = (3, 1, 0, 2, "m", 1, b"\1\0\0\0", b"")
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    assert encode(plain) == raw(*fields)
    assert decode("requests", raw(*fields)) == decode("requests", raw(*fields, False, "")) == plain
    assert decode("requests", encode(replace(plain, whole=True))) == replace(plain, whole=True)
    assert encode(replace(plain, traceparent=trace)) == raw(*fields, False, trace)
    assert decode("requests", raw(*fields, False, "", 1, 9)) == replace(plain, rank=1, uncached=9)
    for wrong in (fields[:-1], (*fields, False, "", 1, 1, 1), (*fields, False, "x" * 65)):
        with pytest.raises(WireError):
            decode("requests", raw(*wrong))


def test_a_message_of_one_link_is_unknown_on_another() -> None:
    with pytest.raises(WireError, match="unknown kind"):
        decode("events", encode(Heartbeat(1, 2, ())))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, 1e13, 1])
def test_floats_are_finite_in_range_and_floats(bad: float) -> None:
    fields = list(msgpack.unpackb(encode(LOAD)[1:]))
    fields[10] = bad
    with pytest.raises(WireError, match="prefill_tps"):
        decode("events", raw(*fields))


def test_a_sender_learns_of_its_own_mistake() -> None:
    for message in (
        Hello("a" * 17, 1),
        Hello("a" * 16, -1),
        Hello("a" * 16, 2**64),
        Hello("\ud800", 1),
        Cancel(((1, 256),)),
        Cancel([(1, 1)]),  # type: ignore[arg-type]
        Heartbeat(1, 1, (True,)),
        Tokens(1, (Delta(-1, 0, 0, (1,)),)),
        Tokens(1, (Delta(1, 0, 0, (2**32,)),)),
        Tokens(1, (Delta(1, 0, 0, (1, 2**32)),)),
        Tokens(1, (Delta(1, 0, 0, (1,), "far too long"),)),
        Tokens(1, (Delta(1, 0, 0, (1,) * 65536),)),
        Generate(1, 0, 1, "m", 1, b"x" * (16 * 2**20 + 1), b""),
        replace(LOAD, itl_ms=math.nan),
    ):
        with pytest.raises(WireError):
            encode(message)
    with pytest.raises(TypeError, match="not a message"):
        encode(object())


def test_the_future_is_told_from_garbage() -> None:
    with pytest.raises(FutureVersion, match=r"protocol version 2.*upgrade") as caught:
        decode("control", b"\x02anything")
    assert caught.value.version == 2
    for data in (b"GET / HTTP/1.1", b"\x00\x01", b"\xff\x00", b""):
        with pytest.raises(WireError) as garbage:
            decode("control", data)
        assert not isinstance(garbage.value, FutureVersion)


def test_deltas_of_every_form_keep_their_order() -> None:
    deltas = (
        Delta(2**64 - 1, 255, 2**32 - 1, (2**32 - 1,)),
        Delta(2, 0, 0, (5,), cached=32),
        Delta(3, 1, 7, (), "abort"),
        Delta(2, 0, 1, (6,)),
        Delta(4, 0, 9, (1, 2, 3), "length", 0, b"\x90"),
        Delta(2, 0, 2, (7,), "stop"),
    )
    data = encode(Tokens(5, deltas))
    assert decode("requests", data) == Tokens(5, deltas)
    assert encode_tokens(5, [tuple(delta) for delta in deltas]) == data


RECORD = b"\0" * 16 + b"\1\0" + b"\0" * 2  # rid 0, offset 0, nothing cached, one id, attempt 0, goes on
TOKEN = b"\7\0\0\0"


def test_token_records_are_as_documented() -> None:
    assert decode("requests", raw(5, b"\0" * 8 + RECORD, TOKEN, [])) == Tokens(0, (Delta(0, 0, 0, (7,)),))
    assert decode("requests", raw(5, b"\0" * 8 + RECORD, TOKEN, [b"x"])) == Tokens(
        0, (Delta(0, 0, 0, (7,), "", 0, b"x"),)
    )


@pytest.mark.parametrize(
    ("block", "ids", "logprobs"),
    [
        (b"", b"", []),
        (b"\0" * 7, b"", []),
        (b"\0" * 8 + RECORD[1:], TOKEN, []),
        (b"\0" * 8 + RECORD, b"", []),  # fewer ids than the records say
        (b"\0" * 8 + RECORD, TOKEN * 2, []),  # more
        (b"\0" * 8 + RECORD, TOKEN[1:], []),
        (b"\0" * 8, b"", [b""]),  # more logprobs than records
        (b"\0" * 8 + RECORD * 2, TOKEN * 2, [b"x"]),  # fewer
        (b"\0" * 8 + RECORD, TOKEN, ["x"]),
        (b"\0" * 8 + RECORD[:-1] + b"\5", TOKEN, []),  # no such finish
        ("\0" * 8, b"", []),
        (b"\0" * 8, [7], []),
        (b"\0" * 8, b"", {}),
    ],
)
def test_malformed_token_records_are_refused(block: Any, ids: Any, logprobs: Any) -> None:
    with pytest.raises(WireError):
        decode("requests", raw(5, block, ids, logprobs))


def test_caps_count_items_and_bytes() -> None:
    assert decode("requests", encode(Heartbeat(1, 1, tuple(range(65536))))) is not None
    for message in (Heartbeat(1, 1, tuple(range(65537))), Tokens(1, (Delta(1, 0, 0, (1,)),) * 65537)):
        with pytest.raises(WireError, match="more than 65536 items"):
            encode(message)
    record = Record("a" * 16, 1, 1, 0, "", "10.0.0.1", 7400, b"x" * 1000, 0)
    with pytest.raises(WireError, match="larger than the 65536 bytes of the control link"):
        encode(Ping(1, "a" * 16, (record,) * 80))


@pytest.mark.parametrize(
    "head", [b"\xdd\x00\x01\x00\x00", b"\xdd\xff\xff\xff\xff", b"\xdf\x00\x01\x00\x00", b"\x91", b"\xdc\xff\xff"]
)
@pytest.mark.parametrize("size", [500, 60_000, 2_000_000])
def test_nested_headers_cost_neither_memory_nor_time(head: bytes, size: int) -> None:
    bomb = VERSION + head * (size // len(head))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(WireError):
        decode("requests", bomb)
    with pytest.raises(WireError):
        decode_params(bomb[1:200_000])
    assert time.process_time() - started < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


@settings(deadline=None)
@given(strategies.infos)
def test_peer_info_comes_back(info: PeerInfo) -> None:
    assert decode_info(encode_info(info)) == info


@settings(deadline=None)
@given(strategies.params)
def test_sampling_params_come_back(params: SamplingParams) -> None:
    assert decode_params(encode_params(params)) == params


def test_only_what_differs_from_the_default_travels() -> None:
    assert encode_params(SamplingParams()) == b"\x80"
    assert decode_params(encode_params(SamplingParams(temperature=2))).temperature == 2.0  # an int is made a float


def test_a_long_detail_is_shortened_and_too_many_models_are_refused() -> None:
    info = PeerInfo("n", "1", detail="é" * 2000)
    data = encode_info(info)
    assert len(data) <= PEER_INFO_MAX
    assert decode_info(data).detail.endswith("é…")
    served = strategies.ServedModel("m" * 100, "c" * 32, "f" * 16, 16, 4096)
    with pytest.raises(WireError, match="serve fewer models"):
        encode_info(PeerInfo("n", "1", models=(served,) * 9))


def test_a_served_model_of_before_it_said_what_moves_kv() -> None:
    row = ["m", "c", "f", 16, 1024, 1, True]
    served = strategies.ServedModel("m", "c", "f", 16, 1024, 1, True)
    assert decode_info(msgpack.packb({"models": [row]})).models == (served,)
    assert msgpack.unpackb(encode_info(PeerInfo("", "", models=(served,))))["models"] == [row]
    moves = replace(served, moves_kv="nixl")
    assert msgpack.unpackb(encode_info(PeerInfo("", "", models=(moves,))))["models"] == [[*row, "nixl"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "n", "role": "king"},
        {"name": 5},
        {"unknown": 1},
        {1: "n"},
        {"progress": 1.5},
        {"models": [["m", "c", "f", 16]]},
        {"models": [["m", "c", "f", 16, 1024, 1, False, 5]]},
        {"models": [["m", "c", "f", 16, 1024, 1, False, "", ""]]},
        {"requests_port": 65536},
        ["name"],
    ],
)
def test_bad_peer_info_is_refused(fields: Any) -> None:
    with pytest.raises(WireError):
        decode_info(msgpack.packb(fields))


def test_bad_sampling_params_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(40):
        deep = [deep]
    bad: list[Any] = [{"max_tokens": True}, {"temperature": math.nan}, {"stop_token_ids": [-1]}, {"nonsense": 1}]
    bad += [{"guided": {"json": deep}}, {"guided": 5}, {"extra": {"x": b"bytes"}}, {"extra": {1: 1}}]
    for fields in bad:
        with pytest.raises(WireError):
            decode_params(msgpack.packb(fields))


def test_logprobs_come_back_finite() -> None:
    rows = ((-0.5, ((7, -0.5), (9, -math.inf))), (-math.inf, ()))
    back = decode_logprobs(encode_logprobs(rows))
    assert back == ((-0.5, ((7, -0.5), (9, -9999.0))), (-9999.0, ()))
    for bad in ([[1]], [[math.nan, []]], [[-1.0, [[-1, -1.0]]]], [[-1.0, [[1]]]], {}, [["x", []]]):
        with pytest.raises(WireError):
            decode_logprobs(msgpack.packb(bad))


def test_a_header_has_fixed_fields() -> None:
    header = Header("c", "a" * 16, 1, 2)
    assert decode("control", encode(header)) == header
