"""A small Hugging Face style model folder: byte-level BPE tokenizer of 4096 entries, ChatML template, Llama config.

Both sides of the throughput bench serve this folder. No weights: `sim` and Dynamo's mocker need none.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

VOCABULARY = 4096
CONTEXT = 32768
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "d",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "io", "ou"]
CODAS = ["", "", "l", "m", "n", "nd", "ng", "r", "rs", "s", "st", "t"]


def words(count: int = 5000, seed: int = 7) -> list[str]:
    """Made-up words of one to four syllables, the same for the same seed."""
    rng = random.Random(seed)
    return [
        "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 2, 2, 3, 4))))
        for _ in range(count)
    ]


def text(rng: random.Random, vocabulary: list[str], count: int) -> str:
    """`count` words, the early ones of the vocabulary more often than the late ones."""
    return " ".join(vocabulary[int(len(vocabulary) * rng.random() ** 3)] for _ in range(count))


def _corpus() -> Iterator[str]:
    rng = random.Random(11)
    vocabulary = words()
    for _ in range(6000):
        yield text(rng, vocabulary, 40) + "."


def write(folder: Path) -> Path:
    """Write the folder unless it is there; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    parts = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": TEMPLATE,
            "eos_token": "<|im_end|>",
            "bos_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
        },
        "generation_config.json": {"eos_token_id": end, "bos_token_id": 0},
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "eos_token_id": end,
            "bos_token_id": 0,
            "torch_dtype": "float32",
        },
    }
    for name, content in parts.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(write(parser.parse_args().folder))
