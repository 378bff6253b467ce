"""GGUF vocabularies to tokenizer.json, against the tokenizer that the vocabulary came from."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from p2pdyn.engines.base import EngineError
from p2pdyn.engines.builtin.tokenizer import LLAMA3_PATTERN, model_card

CORPUS = [
    "the quick brown fox jumps over the lazy dog in 1999 and 2024, don't we'll see",
    "def f(x):\n    return x + 1  # adds 12345 to nothing\n\n\n",
    "naïve café, Überraschung, 中文, русский, ١٢٣ 👍👍",
] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="the dogx 019'\n\t<|_im>é中👍", max_size=60),
    st.lists(st.sampled_from([*SPECIAL, "  12 345", "don't", "\n\n", "the dog "])).map("".join),
)


class Metadata:
    """The keys of a GGUF file."""

    path = "model.gguf"

    def __init__(self, **keys: Any) -> None:
        self._keys = keys

    def meta(self, key: str, default: Any = None) -> Any:
        return self._keys.get(key.removeprefix("tokenizer.").removeprefix("ggml."), default)


def byte_level(pre: Any) -> Tokenizer:
    """A byte-level BPE trained here, with the named split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def as_metadata(tokenizer: Tokenizer, pre: str, **more: Any) -> Metadata:
    content = json.loads(tokenizer.to_str())
    vocabulary = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    return Metadata(
        **{
            "model": "gpt2",
            "pre": pre,
            "tokens": [token for token, _ in vocabulary],
            "token_type": [3 if token in SPECIAL else 1 for token, _ in vocabulary],
            "merges": [" ".join(merge) for merge in content["model"]["merges"]],
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | more
    )


def split_by(pattern: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
BY_NAME = {
    "gpt-2": PLAIN,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN]),
    "llama-bpe": split_by(LLAMA3_PATTERN),
}
TRAINED = {name: byte_level(pre) for name, pre in BY_NAME.items()}
CONVERTED = {
    name: Tokenizer.from_str(model_card(as_metadata(tokenizer, name, add_bos_token=False), 512).tokenizer_json.decode())
    for name, tokenizer in TRAINED.items()
}


@pytest.mark.parametrize("name", ["gpt-2", "smollm"])
@given(text=TEXTS)
def test_a_converted_vocabulary_gives_the_same_ids(name: str, text: str) -> None:
    assert CONVERTED[name].encode(text).ids == TRAINED[name].encode(text).ids


@pytest.mark.parametrize("name", sorted(CONVERTED))
@given(text=TEXTS)
def test_any_text_survives(name: str, text: str) -> None:
    assert CONVERTED[name].decode(CONVERTED[name].encode(text).ids, skip_special_tokens=False) == text


def test_the_card_tells_ends_template_and_begin() -> None:
    file = as_metadata(TRAINED["llama-bpe"], "llama-bpe", chat_template="{{ x }}")
    card = model_card(file, 77)
    tokenizer = Tokenizer.from_str(card.tokenizer_json.decode())

    assert (card.bos_token, card.eos_token, card.context) == ("<|im_start|>", "<|im_end|>", 77)
    assert set(card.eos_token_ids) == {0, 2}
    assert card.eos_token_ids[0] == 2
    assert card.chat_template == "{{ x }}"
    assert tokenizer.encode("the dog").ids[0] == 1
    assert tokenizer.encode("the dog", add_special_tokens=False).ids == tokenizer.encode("the dog").ids[1:]


# ---- SentencePiece BPE

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
LETTERS = list("▁thequickdogmns.")
WORDS = [
    "▁t",
    "he",
    "▁the",
    "th",
    "▁d",
    "og",
    "▁dog",
    "qu",
    "ick",
    "ic",
    "ck",
    "uick",
    "▁qu",
    "▁quick",
    "▁▁",
    "s.",
    "ns",
]
VOCABULARY = [*PIECES, *LETTERS, *WORDS]
SCORES = [0.0] * len(PIECES) + [-1000.0 - n for n in range(len(LETTERS))] + [-float(n) for n in range(len(WORDS))]
LLAMA = Metadata(
    model="llama",
    tokens=VOCABULARY,
    scores=SCORES,
    token_type=[2, 3, 3] + [6] * 256 + [1] * (len(LETTERS) + len(WORDS)),
    bos_token_id=1,
    eos_token_id=2,
)


def sentencepiece(text: str) -> list[int]:
    """SentencePiece's rule: merge the neighbours whose piece has the best score, leftmost first; bytes for the rest."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(SCORES[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@given(text=st.text(alphabet=" thequickdogmns.é中👍", max_size=30))
def test_sentencepiece_vocabularies_give_its_ids(text: str) -> None:
    tokenizer = Tokenizer.from_str(model_card(LLAMA, 512).tokenizer_json.decode())

    assert tokenizer.encode(text, add_special_tokens=False).ids == sentencepiece(text)
    assert tokenizer.encode(text).ids == [1, *sentencepiece(text)]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"model": "bert", "tokens": ["a"]}, "'bert' tokenizer"),
        ({"model": "gpt2", "pre": "tekken", "tokens": ["a"]}, "splits text by 'tekken'"),
        ({"model": "llama", "tokens": ["a"]}, "no scores"),
        ({"model": "gpt2"}, "no usable vocabulary"),
        ({"model": "gpt2", "tokens": ["a"], "token_type": [1, 1]}, "no usable vocabulary"),
    ],
)
def test_what_is_not_known_is_refused_with_a_sentence(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence):
        model_card(Metadata(**keys), 512)
