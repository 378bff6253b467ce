"""Model folders of real size without real weights: config.json, a tokenizer whose entries are all text, and random
weights where outputs are compared.

The engines' `--load-format dummy` gives the same weights in each process, but all within 1e-3 of zero: greedy choices
are then ties, and say nothing. :func:`write` with ``weights`` draws ones whose greedy choices are clear.
"""

from __future__ import annotations

import json
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Shape(NamedTuple):
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int


SHAPES = {
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128256, 16384),
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 128256, 16384),
    "tiny": Shape(256, 512, 4, 4, 2, 12288, 4096),
}


def write(folder: Path, shape: Shape, *, weights: bool) -> Path:
    """Write the folder unless it is there; returns it."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer(shape.vocabulary)))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": TEMPLATE,
            "eos_token": SPECIAL[2],
            "bos_token": SPECIAL[0],
            "model_max_length": shape.context,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if weights:
            _save_weights(folder, shape)
        (folder / "config.json").write_text(json.dumps(_config(shape)))
    return folder


def tokenizer(size: int) -> dict[str, Any]:
    """Byte-level BPE with ``size`` entries: the bytes, pairs and triples of printable characters, and three special
    tokens at the end. So every answer is text, whatever a random model says, and an entry's text names it."""
    alphabet = ["Ġ", *LETTERS]  # a byte-level tokenizer writes a space so; these first: see gpu_client.text
    alphabet += [chr(code) for code in range(0x21, 0x7F) if chr(code) not in LETTERS]
    entries = alphabet + sorted(set(_byte_letters()) - set(alphabet))
    room = size - len(entries) - len(SPECIAL)
    pairs = [(a, b) for a, b in islice(product(alphabet, repeat=2), room)]
    triples = [(a + b, c) for a, b, c in islice(product(alphabet, repeat=3), room - len(pairs))]
    merges = pairs + triples
    entries += [a + b for a, b in merges]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(entries) + i, "content": name, **flags} for i, name in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {entry: i for i, entry in enumerate(entries)},
            "merges": [list(pair) for pair in merges],
        },
    }


def _byte_letters() -> list[str]:
    """GPT-2's way to write the 256 bytes as characters."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": shape.vocabulary - 3,
        "eos_token_id": shape.vocabulary - 1,
        "torch_dtype": "bfloat16",
    }


def _save_weights(folder: Path, shape: Shape) -> None:
    """bfloat16, the same each time on one kind of device. Queries and keys are larger than the rest, so that attention
    looks at few places and a wrong KV block shows."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(7)

    def tensor(rows: int, columns: int, gain: float = 1.0) -> Any:
        scale = gain / columns**0.5
        drawn = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        return (drawn * scale).to(torch.bfloat16).cpu()

    kv = shape.hidden // shape.heads * shape.kv_heads
    tensors = {
        "model.embed_tokens.weight": tensor(shape.vocabulary, shape.hidden, shape.hidden**0.5),
        "lm_head.weight": tensor(shape.vocabulary, shape.hidden, 4.0),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        for part, rows, gain in (("q", shape.hidden, 1.5), ("k", kv, 1.5), ("v", kv, 1.0), ("o", shape.hidden, 1.0)):
            tensors[f"{name}self_attn.{part}_proj.weight"] = tensor(rows, shape.hidden, gain)
        tensors[f"{name}mlp.gate_proj.weight"] = tensor(shape.inner, shape.hidden)
        tensors[f"{name}mlp.up_proj.weight"] = tensor(shape.inner, shape.hidden)
        tensors[f"{name}mlp.down_proj.weight"] = tensor(shape.hidden, shape.inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
