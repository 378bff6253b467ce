"""A random Llama in Hugging Face's layout, small enough to be made in a second and to serve on one core."""

from __future__ import annotations

import json
from pathlib import Path

from p2pdyn.text.card import CHATML, byte_level

VOCAB, HIDDEN, LAYERS, HEADS, INNER, CONTEXT = 259, 256, 4, 4, 512, 4096
END = 258


def make(folder: Path) -> Path:
    """Write the model: float32, the byte-level tokenizer, ChatML. Weights are large enough that greedy choices are
    clear, and the same each time."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(7)

    def tensor(*shape: int, scale: float = 0.08) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    tensors = {"model.embed_tokens.weight": tensor(VOCAB, HIDDEN, scale=1.0), "lm_head.weight": tensor(VOCAB, HIDDEN)}
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        for part in "qkvo":
            tensors[f"{name}self_attn.{part}_proj.weight"] = tensor(HIDDEN, HIDDEN)
        tensors[f"{name}mlp.gate_proj.weight"] = tensor(INNER, HIDDEN)
        tensors[f"{name}mlp.up_proj.weight"] = tensor(INNER, HIDDEN)
        tensors[f"{name}mlp.down_proj.weight"] = tensor(HIDDEN, INNER)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = np.ones(HIDDEN, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": END,
        "torch_dtype": "float32",
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_bytes(byte_level().tokenizer_json)
    return folder
