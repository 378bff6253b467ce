"""TensorRT-LLM's adapter, piece by piece, against the signatures of each version."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import trtllm_package
from support.engines import Mirror, sequence
from support.trtllm_package import MIDDLE, NEWEST, OLDEST, VERSIONS

from p2pdyn.engines.base import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    EngineOptions,
    EngineUsageError,
    Held,
    KvEvent,
    Output,
)
from p2pdyn.engines.trtllm import arguments, handoff, sampling, strays, versions
from p2pdyn.engines.trtllm.events import Events
from p2pdyn.engines.trtllm.polling import Poller
from p2pdyn.engines.trtllm.stats import Stats

Use = Callable[[str], Any]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Have one version's double imported here."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
            del sys.modules[name]

    def chosen(version: str) -> Any:
        monkeypatch.syspath_prepend(str(trtllm_package.make(tmp_path / version, version)))
        forget()
        import tensorrt_llm

        return tensorrt_llm

    yield chosen
    forget()


# ---- versions and signatures


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1.2.1", (1, 2, 1, versions.FINAL)),
        ("1.3.0rc24", (1, 3, 0, 24)),
        ("1.2.0rc6.post2", (1, 2, 0, 6)),
        ("nonsense", (0, 0, 0, 0)),
    ],
)
def test_versions_are_compared_by_their_numbers(text: str, parts: tuple[int, ...]) -> None:
    assert versions.order(text) == parts


def test_a_version_without_what_is_needed_is_refused() -> None:
    with pytest.raises(EngineUsageError, match=r"1\.1\.0 is too old.*1\.2 and 1\.3"):
        versions.judge("1.1.0")


def test_other_versions_run_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    versions.judge("1.2.1")
    assert "not run on hardware" in caplog.text
    assert "newer" not in caplog.text
    versions.judge("1.5.0")
    assert "1.5.0 is newer" in caplog.text


def test_a_sampler_honours_what_its_version_honours() -> None:
    assert versions.honoured("1.2.1", {}) == ()
    assert versions.honoured("1.3.0rc24", {}) == ("min_p", "penalties")
    assert versions.honoured("1.4.0", {}) == ("min_p", "penalties", "seed")
    assert versions.honoured("1.2.1", {"sampler_type": "TRTLLMSampler"}) == ("min_p", "penalties", "seed")


@pytest.mark.parametrize("version", VERSIONS)
def test_each_signature_names_its_source(version: str) -> None:
    told = trtllm_package.described(version)
    assert told["about"]
    assert all(entry["source"] for entry in told["entries"].values())


def test_an_argument_that_the_file_lacks_raises(use: Use) -> None:
    llm = use(OLDEST).LLM
    with pytest.raises(TypeError, match="priority"):
        llm.generate_async(None, inputs={}, priority=0.5)
    assert versions.takes(use(NEWEST).LLM.generate_async, "priority")


# ---- arguments


def parse(*args: str, role: str = "aggregated", fields: frozenset[str] | None = None) -> arguments.Arguments:
    return arguments.parse(EngineOptions("/m", args=args, role=role), fields)


def test_defaults_are_ours_and_the_users_win() -> None:
    parsed = parse(
        "--tensor-parallel-size", "2", "kv_cache_config.max_tokens=8192", "--kv-cache-config.enable-block-reuse=false",
        "--enable-chunked-prefill", "--dtype=float16", "--cuda-graph-config", '{"max_batch_size": 8}',
    )  # fmt: skip
    assert parsed.llm == {
        "model": "/m",
        "backend": "pytorch",
        "skip_tokenizer_init": True,
        "enable_iter_perf_stats": True,
        "kv_cache_config": {"enable_block_reuse": False, "event_buffer_max_size": 100_000, "max_tokens": 8192},
        "tensor_parallel_size": 2,
        "enable_chunked_prefill": True,
        "dtype": "float16",
        "cuda_graph_config": {"max_batch_size": 8},
    }
    assert parsed.get("kv_cache_config.max_tokens") == 8192
    assert parsed.get("scheduler_config.waiting_queue_policy", "fcfs") == "fcfs"


def test_guided_decoding_needs_the_tokenizer() -> None:
    assert parse("--guided-decoding-backend", "xgrammar").llm["skip_tokenizer_init"] is False


def test_roles_turn_the_transceiver_on() -> None:
    assert "cache_transceiver_config" not in parse().llm
    for role in arguments.ROLES:
        config = parse("--cache-transceiver-config.backend", "NIXL", role=role).llm["cache_transceiver_config"]
        assert config == {"backend": "NIXL", "kv_transfer_timeout_ms": 60_000}
    assert parse(role="prefill").llm["disable_overlap_scheduler"] is True


def test_adapters_turn_lora_on() -> None:
    parsed = parse("--lora-modules", "one=/a", "two=/b", "--dtype", "auto")
    assert parsed.loras == {"one": "/a", "two": "/b"}
    assert parsed.llm["enable_lora"] is True


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("stray",), "not 'stray'"),
        (("--lora-modules", "one"), "NAME=FOLDER"),
        (("--dtype=auto", "--dtype.x=1"), "dtype"),
        (("--no-such-thing=1",), "no argument no_such_thing"),
    ],
)
def test_what_cannot_be_is_one_sentence(args: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(EngineUsageError, match=sentence):
        parse(*args, fields=frozenset({"dtype"}))


def test_defaults_that_a_version_lacks_are_left_out() -> None:
    assert parse("--dtype=auto", fields=frozenset({"dtype", "backend"})).llm.keys() == {"model", "dtype", "backend"}


# ---- sampling


def made(use: Use, version: str, eos: tuple[int, ...] = (258,), features: tuple[str, ...] = (), **params: Any) -> Any:
    use(version)
    asked = sequence(1, [97] * 8, [98] * 2, **params)
    return sampling.to_trtllm(asked, 14, eos, features)


@pytest.mark.parametrize("version", VERSIONS)
def test_parameters_are_mapped_one_to_one(use: Use, version: str) -> None:
    found = made(use, version, temperature=0.7, top_p=0.9, top_k=5, seed=-1, logprobs=0, stop_token_ids=(7, 258))
    assert (found.temperature, found.top_p, found.top_k) == (0.7, 0.9, 5)
    assert found.seed == 2**63 - 1
    assert (found.max_tokens, found.end_id, found.stop_token_ids, found.logprobs) == (14, 258, [7], 1)
    assert (found.include_stop_str_in_output, found.ignore_eos, found.detokenize) == (True, False, False)
    assert (found.min_p, found.repetition_penalty, found.min_tokens) == (None, None, None)


def test_min_tokens_counts_what_was_produced_and_holds_one_end_token_back(use: Use) -> None:
    assert made(use, OLDEST, min_tokens=6).min_tokens == 4
    assert made(use, OLDEST, min_tokens=6, ignore_eos=True, stop_token_ids=(9,)).end_id == 9
    nothing = made(use, OLDEST, min_tokens=6, ignore_eos=True)
    assert (nothing.min_tokens, nothing.end_id, nothing.ignore_eos) == (None, sampling.NO_TOKEN, True)
    with pytest.raises(sampling.Invalid, match=r"min_tokens.*here are 2"):
        made(use, OLDEST, min_tokens=6, stop_token_ids=(9,))


@pytest.mark.parametrize("name", ["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_what_the_sampler_ignores_is_refused(use: Use, name: str) -> None:
    with pytest.raises(ValueError, match=f"ignores {name}"):
        made(use, OLDEST, **{name: 0.4})
    able = versions.honoured(NEWEST, {})
    assert getattr(made(use, NEWEST, features=able, **{name: 0.4}), name) == 0.4


def test_guided_decoding_is_mapped_or_refused(use: Use) -> None:
    with pytest.raises(ValueError, match="--guided-decoding-backend"):
        made(use, OLDEST, guided={"json": {}})
    found = made(use, OLDEST, features=("guided",), guided={"choice": ["a.b", "c"]}).guided_decoding
    assert found.regex == r"(a\.b|c)"
    assert made(use, OLDEST, features=("guided",), guided={"json": {"x": 1}}).guided_decoding.json == {"x": 1}
    with pytest.raises(sampling.Invalid, match="poem"):
        made(use, OLDEST, features=("guided",), guided={"poem": 1})


@given(st.lists(st.integers(-(2**31), 2**31), min_size=2, max_size=5))
def test_priorities_keep_their_order_within_bounds(ours: list[int]) -> None:
    theirs = [sampling.priority_of(one) for one in sorted(ours)]
    assert all(0.0 <= one <= 1.0 for one in theirs)
    assert theirs == sorted(theirs, reverse=True)
    assert sampling.priority_of(0) == 0.5


def completion(tokens: list[int], finish: str | None = None, reason: object = None, rows: Any = ()) -> Any:
    return SimpleNamespace(token_ids=tokens, finish_reason=finish, stop_reason=reason, logprobs=rows)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (completion([5, 6]), ((6,), "")),
        (completion([5, 258], "stop"), ((258,), "stop")),  # a version that keeps it
        (completion([5], "stop"), ((258,), "stop")),  # one that takes it away
        (completion([5], "stop", 7), ((7,), "stop")),
        (completion([5, 7], "stop", 7), ((7,), "stop")),
        (completion([5, 6], "length"), ((6,), "length")),
        (completion([5], "timeout"), ((), "error")),
    ],
)
def test_the_token_that_ends_is_the_last(told: Any, expected: tuple[Any, str]) -> None:
    assert sampling.new_tokens(told, 1, frozenset({258, 7}), 258) == expected


def test_logprobs_are_of_the_chosen_and_the_likeliest() -> None:
    rows = [{5: SimpleNamespace(logprob=-2.0), 6: SimpleNamespace(logprob=-0.5)}]
    assert sampling.logprobs_of(completion([5], rows=rows), 0, (5,), 1) == ((-2.0, ((6, -0.5),)),)
    with pytest.raises(ValueError, match="no logprob"):
        sampling.logprobs_of(completion([9], rows=rows), 0, (9,), 1)


# ---- hand-overs


def answered(api: Any, **fields: Any) -> Any:
    params = api.api.DisaggregatedParams(request_type="context_only", **fields)
    told = SimpleNamespace(token_ids=[5], finish_reason="length", stop_reason=None, disaggregated_params=params)
    return SimpleNamespace(outputs=[told], cached_tokens=32)


@pytest.mark.parametrize("version", VERSIONS)
def test_all_that_is_set_travels(use: Use, version: str) -> None:
    api = use(version)
    fields: dict[str, Any] = {"first_gen_tokens": [5], "ctx_request_id": 2**62, "opaque_state": b"\x00\xff"}
    if version != OLDEST:
        fields |= {"disagg_request_id": 9, "first_gen_log_probs": [{5: api.api.Logprob(logprob=-0.5, rank=1)}]}
    held = handoff.held(3, answered(api, **fields), frozenset(), -1)
    assert isinstance(held, Held)
    assert held.cached == 32
    found = handoff.generation_only(handoff.decode(held.params))
    assert found.request_type == "generation_only"
    assert {name: getattr(found, name) for name in fields} == fields
    assert handoff.carries_logprobs() == (version != OLDEST)


def test_what_the_other_version_does_not_know_is_refused(use: Use) -> None:
    held = handoff.held(3, answered(use(NEWEST), opaque_state=b"x", disagg_request_id=9), frozenset(), -1)
    assert isinstance(held, Held)
    use(OLDEST)
    with pytest.raises(ValueError, match="disagg_request_id"):
        handoff.generation_only(handoff.decode(held.params))


def test_a_prompt_that_ended_at_its_first_token_needs_no_cache(use: Use) -> None:
    answer = answered(use(NEWEST), opaque_state=b"x")
    answer.outputs[0].finish_reason = "stop"
    held = handoff.held(3, answer, frozenset({5}), 5)
    assert isinstance(held, Held)
    assert handoff.decode(held.params) == {handoff.ENDED: [5], "cached": 32}


def test_nothing_held_is_an_error(use: Use) -> None:
    found = handoff.held(3, answered(use(NEWEST)), frozenset(), -1)
    assert isinstance(found, Output)
    assert found.finish == "error"


@pytest.mark.parametrize("packed", [b"", b"\x01nonsense", b"\xc0", b"\x80", bytes(handoff.MAX_PARAMS + 1)])
def test_nonsense_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        handoff.decode(packed)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**48))
def test_machines_fit_both_forms_of_ids(node: int, epoch: int) -> None:
    assert 0 <= handoff.machine(f"{node:016x}", epoch) < 2**14


def test_ids_are_asked_for_in_the_form_of_the_version(use: Use) -> None:
    for version, known in ((OLDEST, False), (MIDDLE, True), (NEWEST, True)):
        use(version)
        for number in (0, 2**14 - 1):
            assert (handoff.request_id(number) is not None) == known
        assert getattr(handoff.context_only(77), "disagg_request_id", None) is None or known


# ---- events

SIZE = 4


def block(name: Any, tokens: list[int], **more: Any) -> dict[str, Any]:
    unique = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens]
    return {"type": "stored_block", "block_hash": name, "tokens": unique, "cache_level": 0, "priority": 35, **more}


def stored(parent: int | None, *blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "stored", "parent_hash": parent, "blocks": list(blocks), **more}


def removed(*names: int) -> dict[str, Any]:
    return {"type": "removed", "block_hashes": list(names)}


def moved(name: int, old: int, new: int) -> dict[str, Any]:
    return {
        "type": "updated",
        "block_hash": name,
        "cache_level": {"type": "event_diff", "new_value": new, "old_value": old},
    }


CREATED = {"type": "created", "num_blocks_per_cache_level": [64, 0]}
TIERED = {"type": "created", "num_blocks_per_cache_level": [64, 32]}
FULL = [1, 2, 3, 4]


class Stream:
    """Numbers events as TensorRT-LLM does."""

    def __init__(self, created: dict[str, Any] = CREATED) -> None:
        self.events = Events(SIZE, {1: "poet"})
        self.number = 0
        assert self.read(created) == []

    def read(self, *data: dict[str, Any], window: int | None = 4096, skip: int = 0) -> list[KvEvent]:
        self.number += skip
        raw = []
        for one in data:
            raw.append({"event_id": self.number, "data": one} | ({} if window is None else {"window_size": window}))
            self.number += 1
        return self.events.read(raw)


def test_full_blocks_are_told_and_partial_ones_left_out() -> None:
    stream = Stream()
    told = stream.read(stored(None, block(2**64 - 1, FULL), block(8, [5, 6, 7, 8]), block(9, [1, 2])))
    assert told == [BlocksStored((2**64 - 1, 8), None, (1, 2, 3, 4, 5, 6, 7, 8))]
    assert stream.read(stored(9, block(10, FULL))) == []  # behind a partial one
    assert stream.read(removed(9, 8)) == [BlocksRemoved((8,))]
    assert dict(stream.events.dropped) == {"partial": 1, "parent": 1}
    assert stream.events.capacity == 64


def test_negative_and_hexadecimal_names_are_the_same_64_bits() -> None:
    stream = Stream()
    assert stream.read(stored(None, block("ab" * 24 + "00000000000000ff", FULL))) == [
        BlocksStored((255,), None, tuple(FULL))
    ]
    assert stream.read(stored(None, block(-1, [9] * 4))) == [BlocksStored((2**64 - 1,), None, (9,) * 4)]
    assert stream.read(removed(255)) == [BlocksRemoved((255,))]


def test_only_the_widest_window_counts() -> None:
    stream = Stream()
    assert stream.read(CREATED, stored(None, block(7, FULL)), window=128) == []
    assert stream.read(stored(None, block(8, FULL))) == [BlocksStored((8,), None, tuple(FULL))]
    assert stream.events.dropped["window"] == 1
    assert stream.events.capacity == 64


def test_events_without_windows_are_taken() -> None:
    events = Events(SIZE)
    raw = [{"event_id": 0, "data": CREATED}, {"event_id": 1, "data": stored(None, block(7, FULL))}]
    assert events.read(raw) == [BlocksStored((7,), None, tuple(FULL))]


def test_a_gap_forgets_everything_and_what_comes_then_counts() -> None:
    stream = Stream()
    stream.read(stored(None, block(7, FULL)))
    assert stream.read(stored(7, block(8, FULL)), skip=3) == [BlocksCleared()]  # its parent may be gone
    assert "3 KV events were lost" in stream.events.problems[0]
    assert stream.read(stored(None, block(7, FULL))) == [BlocksStored((7,), None, tuple(FULL))]


def test_numbers_that_begin_anew_are_another_engine() -> None:
    stream = Stream()
    stream.read(stored(None, block(7, FULL)))
    stream.number = 0
    assert stream.read(CREATED) == [BlocksCleared()]


def test_what_cannot_be_read_forgets_everything() -> None:
    stream = Stream()
    stream.read(stored(None, block(7, FULL)))
    assert stream.read({"type": "removed"}) == [BlocksCleared()]
    assert "could not be read" in stream.events.problems[-1]
    assert stream.read(stored(None, block(7, FULL * 2))) == []
    assert len(stream.events) == 0


def test_salts_and_adapters_are_told() -> None:
    stream = Stream()
    told = stream.read(
        stored(None, block(7, FULL, cache_salt="s")),
        stored(None, block(8, FULL), lora_name="bard"),
        stored(None, block(9, FULL, lora_id=1)),
        stored(None, block(10, FULL, lora_id=2)),
    )
    assert [(one.salt, one.lora) for one in told if isinstance(one, BlocksStored)] == [
        ("s", ""),
        ("", "bard"),
        ("", "poet"),
    ]
    assert stream.events.dropped["lora"] == 1


def test_images_are_left_out() -> None:
    stream = Stream()
    pictured = block(7, FULL)
    pictured["tokens"][2]["token_extra_id"] = 77
    assert stream.read(stored(None, pictured, block(8, FULL)), stored(None, block(9, FULL, mm_keys=[{}]))) == []
    assert stream.events.dropped["keys"] == 2


def test_blocks_that_move_are_told_in_their_new_tier() -> None:
    stream = Stream(TIERED)
    stream.read(stored(None, block(7, FULL), block(8, [5] * 4)))
    assert stream.read(moved(8, 0, 1)) == [BlocksStored((8,), 7, (5,) * 4, tier=1), BlocksRemoved((8,), 0)]
    assert stream.read(moved(8, 1, 0)) == [BlocksStored((8,), 7, (5,) * 4), BlocksRemoved((8,), 1)]
    assert stream.read({"type": "updated", "block_hash": 7, "cache_level": None}, moved(99, 0, 1)) == []
    assert stream.read(moved(8, 0, 1), removed(7, 8))[-2:] == [BlocksRemoved((7,), 0), BlocksRemoved((8,), 1)]


def test_a_block_told_twice_is_one() -> None:
    stream = Stream()
    stream.read(stored(None, block(7, FULL)))
    assert stream.read(stored(None, block(7, FULL), block(8, FULL))) == [BlocksStored((8,), 7, tuple(FULL))]
    assert stream.read(removed(7)) == [BlocksRemoved((7,))]


NAMES = st.integers(1, 12)
CHANGES = st.one_of(
    st.tuples(st.just("store"), st.one_of(st.none(), NAMES), st.lists(NAMES, min_size=1, max_size=4, unique=True)),
    st.tuples(st.just("remove"), st.none(), st.lists(NAMES, min_size=1, max_size=4, unique=True)),
    st.tuples(st.just("lose"), st.none(), st.just([0])),
)


@given(st.lists(CHANGES, max_size=40))
def test_whatever_is_told_a_reader_can_follow(changes: list[tuple[str, int | None, list[int]]]) -> None:
    """No block is stored twice or behind an unknown one, none is removed that is not there."""
    stream, mirror = Stream(), Mirror(SIZE)
    for kind, parent, names in changes:
        if kind == "lose":
            stream.number += 1
            continue
        fresh = [block(name, [name] * 4) for name in names]
        told = stream.read(stored(parent, *fresh) if kind == "store" else removed(*names))
        for event in told:  # a mirror wants to know of one tier alone
            mirror.apply([event])
        assert len(mirror.blocks) == len(stream.events)


# ---- polling


def test_looks_that_fail_are_told_once_and_cost_what_is_known(caplog: pytest.LogCaptureFixture) -> None:
    class Closed:
        def get_stats_async(self, timeout: float) -> Any:
            raise RuntimeError("the queue is closed")

    stream = Stream()
    stream.read(stored(None, block(7, FULL)))
    poller = Poller(Closed(), Stats(), stream.events)

    async def looks() -> list[tuple[bool, list[KvEvent]]]:
        return [await poller.look() for _ in range(3)]

    assert asyncio.run(looks()) == [(False, [BlocksCleared()]), (False, []), (False, [])]
    assert caplog.text.count("the queue is closed") == 1


# ---- strays


def test_what_carries_another_mark_lives(tmp_path: Path) -> None:
    assert strays.end(tmp_path) == []
