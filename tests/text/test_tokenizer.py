"""Both directions against the `tokenizers` library itself, for every kind of decoder."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from p2pdyn.text.card import byte_level
from p2pdyn.text.tokenizer import GPT2, LLAMA3, QWEN2, Tokenizer, TokenizerError

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's not the first time. Don't you think?",
    "Numbers 123 4567 and symbols (x) [y] {z} <|im_end|> naïve café 你好 世界 ✓ emoji 😀 e\u0301",
    "def main():\n\treturn value + 12  # comment\n\n\nclass Other: pass",
] * 4
SPECIALS = ["<|im_start|>", "<|im_end|>"]


def byte_bpe(pre_tokenizer: object, normalizer: object = None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer  # type: ignore[assignment]
    if normalizer:
        made.normalizer = normalizer  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def split(pattern: str) -> object:
    isolated = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([isolated, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece_like() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    made.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *SPECIALS, *fallback], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


digits = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


def around(inner: tokenizers.Tokenizer, single: str) -> tokenizers.Tokenizer:
    """With what a model adds to a prompt, as Llama 3's tokenizer says it."""
    special = [(name, inner.token_to_id(name)) for name in SPECIALS]
    template = processors.TemplateProcessing(single=single, special_tokens=special)
    inner.post_processor = processors.Sequence([processors.ByteLevel(), template])  # type: ignore[assignment]
    return inner


CUTTABLE = {
    "gpt2": byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": byte_bpe(digits),
    "gpt2-split": byte_bpe(split(GPT2)),
    "llama3": around(byte_bpe(split(LLAMA3)), "<|im_start|> $A"),
    "both-ends": around(byte_bpe(split(LLAMA3)), "<|im_start|> $A <|im_end|>"),
    "qwen2": byte_bpe(split(QWEN2), normalizers.NFC()),
}
OTHERS = {
    "twice": around(byte_bpe(split(LLAMA3)), "$A $A"),
    "prefix-space": byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "sentencepiece": sentencepiece_like(),
    "byte-level": tokenizers.Tokenizer.from_buffer(byte_level().tokenizer_json),
}
ALL = {name: (inner, Tokenizer(inner.to_str().encode())) for name, inner in {**CUTTABLE, **OTHERS}.items()}

WORDS = st.sampled_from(
    ["the", "The", "don't", "'s", "x's", "café", "1", "23 4", "(x)", "end.", "a,b", "\n", "\n\nNext", "\t", "", "你好",
     "😀", "end\n", "<|im_end|>", "e\u0301", "\u0301", "\xa0x", "x\u2003", "\x1c", "~", "`", "9th", "a_b", "A-B", "?"]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=25).map(" ".join), st.text("aZ '.\n1é", max_size=40))


def test_which_tokenizers_are_cut() -> None:
    assert {name for name, (_, ours) in ALL.items() if ours._cuttable} == set(CUTTABLE)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ALL)), TEXTS)
def test_encoding_is_the_librarys(name: str, text: str) -> None:
    inner, ours = ALL[name]
    for _ in range(2):  # new pieces, then known ones
        assert list(ours.encode(text, False)) == inner.encode(text, add_special_tokens=False).ids
        assert list(ours.encode(text, True)) == inner.encode(text).ids


def test_a_text_of_many_new_words_is_encoded_and_partly_learnt() -> None:
    inner, ours = ALL["gpt2"]
    text = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}x" for i in range(200))
    for _ in range(9):
        assert list(ours.encode(text, False)) == inner.encode(text, add_special_tokens=False).ids


def test_pieces_that_come_once_push_no_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pdyn.text.tokenizer.MAX_PIECES", 8)
    inner, ours = ALL["gpt2"]
    ours._pieces.clear()
    for number in range(40):
        text = f"id{number}x said hello again"
        assert list(ours.encode(text, False)) == inner.encode(text, add_special_tokens=False).ids
    assert sorted(ours._pieces) == ["again ", "hello", "said"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ALL)), TEXTS, st.lists(st.integers(0, 258), max_size=12))
def test_token_by_token_gives_the_text_of_the_whole(name: str, text: str, noise: list[int]) -> None:
    """Also for ids in an order that no text has: broken characters, specials between the bytes of one."""
    inner, ours = ALL[name]
    ids = inner.encode(text, add_special_tokens=False).ids
    for tokens in (ids, noise, [*ids[: len(ids) // 2], *noise, *ids[len(ids) // 2 :]]):
        whole = inner.decode(tokens, skip_special_tokens=True)
        if name == "sentencepiece" and tokens is not ids:
            continue  # its decoder rewrites what it has said; only text that was encoded has one reading
        stream = ours.detokenizer()
        assert "".join([*map(stream.push, tokens), stream.finish()]) == whole
        assert ours.decode(tokens) == whole


def test_texts_that_come_once_are_not_kept() -> None:
    encode = """
import random, string
from pathlib import Path
from p2pdyn.text.card import byte_level
from p2pdyn.text.tokenizer import Tokenizer

tokenizer, rng, pages = Tokenizer(byte_level().tokenizer_json), random.Random(1), []
for number in range(6001):
    tokenizer.encode("".join(rng.choices(string.ascii_letters + "  ", k=200)), False)
    if number % 3000 == 0:
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
print(pages[-1] - pages[-2])
"""
    pages = subprocess.run([sys.executable, "-c", encode], check=True, capture_output=True, text=True, timeout=60)
    assert int(pages.stdout) * 4096 < 2 * 2**20


def test_a_tokenizer_that_cannot_be_used_is_a_sentence() -> None:
    for data in (b"", b"{}", b"\xff", b'{"model": 1}'):
        with pytest.raises(TokenizerError, match="cannot be used"):
            Tokenizer(data)
