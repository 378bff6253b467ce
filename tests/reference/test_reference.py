"""The builtin model against transformers: the same GGUF file, read and computed by independent code, in float32."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest

from p2pdyn.core.types import SamplingParams
from p2pdyn.engines.base import EngineOptions, Sequence
from p2pdyn.engines.builtin import BuiltinEngine, create, weights
from p2pdyn.text.card import ModelCard

torch = pytest.importorskip("torch", reason="needs the environment of `tox -e reference`")
transformers = pytest.importorskip("transformers", reason="needs the environment of `tox -e reference`")
tokenizers = pytest.importorskip("tokenizers")

NEW_TOKENS = 32
TIE = 1e-3
"""Where the reference's own two best are closer than this, in logprob, either is right."""

PROMPTS = [
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a short poem about the sea and the moon.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a village by the river,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are:\n1.",
    "12 + 30 = 42, 17 + 5 =",
    "Der schnelle braune Fuchs springt über",
    "Gravity is a force that attracts two objects with mass toward each other. " * 12 + "In short,",
]

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def gguf() -> Path:
    return weights.locate(None, False, weights.cache_folder(), lambda fraction, what: None)


@pytest.fixture(scope="module")
def engine() -> Any:
    made = create(EngineOptions(args=("--kv-blocks=256",)))
    made.load(lambda fraction, what: None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def card() -> ModelCard:
    made = create(EngineOptions(args=("--kv-blocks=64",)))
    packed = made.load(lambda fraction, what: None).card
    made.close()
    return ModelCard.unpack(packed)


@pytest.fixture(scope="module")
def reference(gguf: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()


def greedy(engine: BuiltinEngine, ids: list[int]) -> tuple[list[int], list[float]]:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    engine.submit(Sequence(1, array("I", ids), len(ids), params), 0.0)
    tokens: list[int] = []
    logprobs: list[float] = []
    while engine.next_step(0.0) is not None:
        for output in engine.step(0.0).outputs:
            tokens += output.tokens
            logprobs += [chosen for chosen, _ in output.logprobs]
    return tokens, logprobs


@pytest.mark.parametrize("text", PROMPTS, ids=range(len(PROMPTS)))
def test_greedy_output_is_the_references(engine: BuiltinEngine, reference: Any, card: ModelCard, text: str) -> None:
    """At each position the reference, given the same tokens before, prefers the same token, or nearly so."""
    ids = tokenizers.Tokenizer.from_str(card.tokenizer_json.decode()).encode(text).ids
    tokens, logprobs = greedy(engine, ids)
    assert len(tokens) == NEW_TOKENS

    with torch.no_grad():
        logits = reference(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    expected = torch.log_softmax(logits.double(), dim=-1)

    for position, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        row = expected[position]
        gap = float(row.max() - row[token])
        assert gap < TIE, f"position {position}: {token}, but the reference prefers {int(row.argmax())} by {gap}"
        assert logprob == pytest.approx(float(row[token]), abs=TIE)


def strings() -> list[str]:
    """Words, digits, spaces of all kinds, several scripts, emoji, code, control tokens, and pieces of each glued."""
    base = [
        "", " ", "  ", "\n", "\n\n", "\t\t x", " \n ", "a", " a", "a ", "Hello, world!", "don't we'll I'VE they'RE",
        "1", "12", "1234567890", " 3.14159", "-42", "1,000,000", "2026-11-22T16:00", "0x1F", "x1y22z333", "١٢٣",
        "²³½Ⅷ", "über naïve café", "Żółć", "Ελληνικά", "русский текст", "中文字符测试", "日本語のテキスト", "한국어",
        "עברית", "العربية", "हिन्दी", "ไทย", "👍", "👩‍👩‍👧‍👦 family", "🇫🇷🇩🇪", "e\u0301 é", "\u200b\u200d", "\u00a0nbsp",
        "\u3000wide", "\ufeffbom", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "def f(x):\n    return x ** 2\n", '{"a": [1, 2.5, null]}',
        "<html>&amp;</html>", "https://a.example/?q=1&r=%20", "SELECT * FROM t WHERE a >= 10;", "C:\\path\\to",
        "a_b-c.d/e", "!!!???...", "—–‘’“”", "$5.00 €7 £9", "#tag @user", "<|im_start|>user\nhi<|im_end|>\n",
        "<|endoftext|>", "<|im_start|", "CamelCaseWord ALLCAPS", "line\r\nline\rline", "\x00\x01\x7f", "tab\tnew\nline",
        "supercalifragilisticexpialidocious", "aaaaaaaaaaaaaaaaaaaaaaaa", " " * 40,
    ]  # fmt: skip
    glued = [left + right for left, right in zip(base, base[7:] + base[:7], strict=True)]
    spaced = [f" {left}  {right}\n" for left, right in zip(base, base[23:] + base[:23], strict=True)]
    numbers = [f"{n} and {n * 7919}th of {n / 7}" for n in range(40)]
    return base + glued + spaced + numbers


def test_the_tokenizer_is_the_references(gguf: Path, card: ModelCard) -> None:
    """transformers takes no notice of tokenizer.ggml.pre and splits as GPT-2 does; "smollm" splits off each digit first
    (as in llama.cpp and the model's own tokenizer.json), which is put in front of what it made."""
    loaded = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    theirs = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, theirs.pre_tokenizer])
    ours = tokenizers.Tokenizer.from_str(card.tokenizer_json.decode())
    texts = strings()
    assert len(texts) >= 200

    different = [text for text in texts if ours.encode(text).ids != theirs.encode(text).ids]

    assert different == []
    assert [ours.decode(ours.encode(text).ids, skip_special_tokens=False) for text in texts] == texts
    assert loaded.chat_template == card.chat_template
    assert loaded.eos_token_id in card.eos_token_ids
