"""GGUF files, written here with the `gguf` package's writer, as the engine reads them."""

from __future__ import annotations

import fcntl
import os
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.engines import text

from p2pdyn.engines.base import EngineError, EngineOptions
from p2pdyn.engines.builtin import create
from p2pdyn.engines.builtin.checkpoint import GgufFile, pack, shapes, unpermute
from p2pdyn.engines.builtin.model import Llama, LlamaConfig, Rows
from p2pdyn.engines.builtin.tiles import F32, Threads
from p2pdyn.engines.builtin.tiny import random_tensors
from p2pdyn.text.card import ModelCard

CONFIG = LlamaConfig(2, 64, 4, 2, 16, 128, 272, 272, 512, 2**-17, 10000.0, tied=True)
BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]] + [chr(256 + n) for n in range(68)]
TOKENS = [*BYTES, "<|im_start|>", "<|im_end|>", *(f"<{n}>" for n in range(14))]
Types = gguf.GGMLQuantizationType


def permute(weight: F32, heads: int) -> F32:
    """As llama.cpp's converter does it, for the test to be independent of the engine's inverse."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, kind: Types = Types.F32, architecture: str = "llama", leave: str = "", **more: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    config = CONFIG
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(more.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 256 + [3] * 16)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{{ messages }}")
    for key, value in more.get("numbers", {}).items():
        writer.add_uint32(key, value)
    tensor = random_tensors(shapes(config))
    for name in shapes(config):
        data = tensor(name)
        if ".attn_q." in name or ".attn_k." in name:
            data = permute(data, config.heads if ".attn_q." in name else config.kv_heads)
        if name == leave:
            continue
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    for name, data in more.get("tensors", {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(tensors: dict[str, F32]) -> F32:
    model = Llama(CONFIG, tensors, 8, 16, Threads(1))
    return model.forward([Rows(array("I", range(40)), 0, [0, 1, 2], logits=True)])[0]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "p2pdyn"


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(Types.F32, 0), (Types.F16, 2e-3), (Types.BF16, 2e-2), (Types.Q8_0, 2e-2), (Types.Q5_1, 0.2), (Types.Q4_1, 0.4)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_file_gives_the_model_that_was_written(tmp_path: Path, kind: Types, tolerance: float) -> None:
    file = GgufFile(write(tmp_path / "m.gguf", kind))

    assert file.config() == CONFIG
    expected = logits(dict(pack(CONFIG, random_tensors(shapes(CONFIG)), None)))
    found = logits(dict(pack(CONFIG, file.tensor, file.rope_factors())))
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_unpermute_is_the_inverse() -> None:
    weight = np.arange(64 * 3, dtype=np.float32).reshape(64, 3)
    assert np.array_equal(unpermute(permute(weight, 4), 4), weight)


def test_the_engine_serves_a_file_and_its_card(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "my-model.gguf")
    texts = []
    for _ in range(2):  # the second one maps what the first has unpacked
        engine = create(EngineOptions(str(path), offline=True, args=("--kv-blocks=8", "--context=100")))
        info = engine.load(lambda fraction, what: None)
        texts.append(text(engine, range(30), max_tokens=10, ignore_eos=True))
        engine.close()
    card = ModelCard.unpack(info.card)

    assert texts[0] == texts[1]
    assert len(texts[0]) == 10
    assert (info.model, info.context, card.context) == ("my-model", 100, 100)
    assert (card.eos_token_ids, card.bos_token, card.chat_template) == ((257,), "<|im_start|>", "{{ messages }}")
    assert [file.suffix for file in sorted(cache.iterdir())] == [".packed", ".lock"]


def weights_of(path: Path) -> str:
    engine = create(EngineOptions(str(path), args=("--kv-blocks=8",)))
    info = engine.load(lambda fraction, what: None)
    engine.close()
    return info.weights


def test_workers_know_whether_their_weights_are_the_same(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "m.gguf")
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    other = write(tmp_path / "other.gguf", Types.Q8_0)

    unpacked, mapped = weights_of(path), weights_of(path)

    assert unpacked == mapped == weights_of(copy) != weights_of(other)


def test_packed_files_that_nobody_will_read_are_swept(tmp_path: Path, cache: Path) -> None:
    """Of an older format, of a file that changed or is gone, half written; nothing else, and none that is in use."""
    path = write(tmp_path / "m.gguf")
    weights_of(path)
    (first,) = cache.glob("*.packed")
    content = first.read_bytes()

    def packed(letter: str, version: bytes, suffix: str = "packed") -> Path:
        file = cache / f"m-{letter * 16}.{suffix}"
        file.write_bytes(b"p2pdyn" + version + content[8:])
        return file

    stale = [packed("a", b"01"), packed("b", b"02"), packed("c", b"02", "part"), first]
    keep = [packed("d", b"99"), cache / "other.packed", cache / f"notes-{'e' * 16}.packed"]
    for file in keep[1:]:
        file.write_bytes(b"somebody else's")
    locked = packed("f", b"01")
    with Path(f"{locked}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(path, ns=(1, 1))  # the file is another one now
        weights_of(path)

    assert not [file for file in stale if file.exists()]
    assert all(file.exists() for file in (*keep, locked))
    assert len(list(cache.glob("m-*.packed"))) == 3  # made anew, of a later version, in use


def test_whoever_has_mapped_a_file_that_is_swept_keeps_it(tmp_path: Path, cache: Path) -> None:
    path, other = write(tmp_path / "m.gguf"), write(tmp_path / "other.gguf")
    engine = create(EngineOptions(str(path), args=("--kv-blocks=8",)))
    engine.load(lambda fraction, what: None)
    before = text(engine, range(30), max_tokens=10, ignore_eos=True)
    path.unlink()
    weights_of(other)

    assert not list(cache.glob("m-*.packed"))
    assert text(engine, range(60, 90), max_tokens=10, ignore_eos=True)
    assert text(engine, range(30), max_tokens=10, ignore_eos=True) == before
    engine.close()


def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "m.gguf")

    def run() -> list[int]:
        engine = create(EngineOptions(str(path), args=("--kv-blocks=8",)))
        engine.load(lambda fraction, what: None)
        try:
            return text(engine, range(30), max_tokens=10, ignore_eos=True)
        finally:
            engine.close()

    first = run()
    packed = next(cache.glob("*.packed"))
    packed.write_bytes(packed.read_bytes()[:-100])
    assert run() == first


def test_a_cache_that_cannot_be_written_costs_only_memory(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    engine = create(EngineOptions(str(write(tmp_path / "m.gguf")), args=("--kv-blocks=8",)))
    engine.load(lambda fraction, what: None)

    assert len(text(engine, range(30), max_tokens=10, ignore_eos=True)) == 10
    engine.close()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "gpt2"}, "'gpt2'; the builtin engine runs only 'llama'"),
    "tensor missing": ({"leave": "blk.1.ffn_up.weight"}, "lacks the tensor blk.1.ffn_up.weight"),
    "tensor unknown": ({"tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, "blk.0.attn_q.bias"),
    "experts": ({"numbers": {"llama.expert_count": 4}}, "experts"),
    "partial rotation": ({"numbers": {"llama.rope.dimension_count": 8}}, "partial rotation"),
    "pre-tokenizer": ({"pre": "tekken"}, "'tekken'"),
}


@pytest.mark.parametrize(("change", "sentence"), REFUSED.values(), ids=list(REFUSED))
def test_what_the_engine_cannot_run_is_refused_with_a_sentence(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    path = write(tmp_path / "m.gguf", **change)
    with pytest.raises(EngineError) as refused:
        create(EngineOptions(str(path))).load(lambda fraction, what: None)
    assert sentence in str(refused.value)
    assert "name another --model" in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"x" * 5000, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(EngineError, match="not a readable GGUF file"):
        create(EngineOptions(str(tmp_path / "m.gguf"))).load(lambda fraction, what: None)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(EngineError):
        create(EngineOptions(str(path))).load(lambda fraction, what: None)
