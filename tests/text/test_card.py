"""Cards: what is packed comes back; what a hostile peer sends does not get in; model folders are read as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pdyn.text.card import CHATML, END_OF_TEXT, IM_END, CardError, ModelCard, byte_level, from_folder

CARD = ModelCard(b"{}", "t", (1, 2), "<s>", "</s>", 4096, {"temperature": 0.6, "top_k": 20.0}, ("logprobs", "seed"))


def test_a_card_survives_packing_and_equal_cards_have_one_digest() -> None:
    assert ModelCard.unpack(CARD.pack()) == CARD
    assert len(CARD.digest) == 32
    shuffled = ModelCard(
        b"{}", "t", (1, 2), "<s>", "</s>", 4096, {"top_k": 20, "temperature": 0.6}, ("seed", "logprobs")
    )
    assert shuffled.digest == CARD.digest
    assert ModelCard(b"{}", "u", (1, 2)).digest != CARD.digest


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_card_are_refused(data: bytes) -> None:
    with pytest.raises(CardError):
        ModelCard.unpack(data)


@settings(deadline=None)
@given(
    st.integers(0, 8), st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.binary())
)
def test_a_field_of_another_kind_is_refused_or_valid(position: int, value: object) -> None:
    parts = msgpack.unpackb(CARD.pack())
    parts[position] = value
    try:
        packed = msgpack.packb(parts)
    except (OverflowError, ValueError, UnicodeEncodeError):
        return
    try:
        card = ModelCard.unpack(packed)
    except CardError:
        return
    assert ModelCard.unpack(card.pack()) == card


def test_caps_hold() -> None:
    parts = msgpack.unpackb(CARD.pack())
    for position, value in ((2, "x" * 300_000), (3, list(range(65))), (7, [["temperature", 1e9]]), (7, [["max", 1.0]])):
        with pytest.raises(CardError):
            ModelCard.unpack(msgpack.packb([*parts[:position], value, *parts[position + 1 :]]))


def test_a_model_folder_gives_its_card(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level().tokenizer_json)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048, "eos_token_id": 256}))
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 7, "eos_token_id": [257]})
    )
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    tokens = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>", "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    card = from_folder(tmp_path, ["seed"])
    assert (card.context, card.eos_token_ids, card.chat_template) == (2048, (257, 256, IM_END), "yes")
    assert (card.generation, card.features, card.bos_token) == ({"temperature": 0.6}, ("seed",), "<|endoftext|>")
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert from_folder(tmp_path).chat_template == "newer"


def test_a_folder_without_a_usable_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="does not exist"):
        from_folder(tmp_path / "none")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CardError, match=r"has tokenizer.model but no tokenizer.json: convert it"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("not json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    with pytest.raises(CardError, match="not a tokenizer"):
        from_folder(tmp_path)


def test_the_byte_level_card_needs_nothing() -> None:
    card = byte_level(("seed",), 512)
    assert (card.chat_template, card.eos_token_ids) == (CHATML, (END_OF_TEXT, IM_END))
    loads = "import sys; from p2pdyn.text.card import byte_level; byte_level().pack(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True).stdout.split()
    assert not {"tokenizers", "jinja2", "numpy", "starlette", "uvicorn"} & set(modules)
