"""From a GGUF file's vocabulary to a model card: the tokenizer in Hugging Face's JSON form, and the chat template.

Byte-level BPE by its pre-tokenizer's name is converted exactly, and so is SentencePiece BPE (`llama`); anything else is
refused, since a tokenizer that is nearly right is worse than none.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

from p2pdyn.engines.base import EngineError
from p2pdyn.text.card import MAX_EOS, MAX_TEMPLATE, ModelCard

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of the GGUF specification."""

END_TEXTS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
"""Control tokens that end a turn or text whatever else the metadata names, as llama.cpp treats them."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


class Metadata(Protocol):
    """What is asked of a GGUF file."""

    path: Any

    def meta(self, key: str, default: Any = None) -> Any:
        """The value of a key."""


def model_card(file: Metadata, context: int) -> ModelCard:
    """The card of a GGUF file. Raises EngineError for a tokenizer that is not known."""
    tokens: list[str] = file.meta("tokenizer.ggml.tokens", [])
    types: list[int] = file.meta("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise EngineError(f"{file.path} has no usable vocabulary: name another --model")
    model = file.meta("tokenizer.ggml.model", "unknown")
    if model == "gpt2":
        content = _byte_level(file, tokens)
    elif model == "llama":
        content = _sentencepiece(file, tokens, types)
    else:
        raise EngineError(f"{file.path} has a {model!r} tokenizer; the builtin engine reads gpt2 and llama ones")
    content["added_tokens"] = [
        _added(index, token, kind == CONTROL)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and model == "llama")
    ]
    bos, eos = (file.meta(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    if _adds_bos(file, model) and bos is not None:
        content["post_processor"] = _begin_with(tokens[bos], bos, content["post_processor"])
    ends = [eos, file.meta("tokenizer.ggml.eot_token_id")]
    ends += [index for index, token in enumerate(tokens) if types[index] == CONTROL and token in END_TEXTS]
    template = file.meta("tokenizer.chat_template", "")
    return ModelCard(
        json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"),
        template if isinstance(template, str) and len(template.encode()) <= MAX_TEMPLATE else "",
        tuple(dict.fromkeys(end for end in ends if end is not None))[:MAX_EOS],
        tokens[bos] if bos is not None else "",
        tokens[eos] if eos is not None else "",
        context,
    )


def _adds_bos(file: Metadata, model: str) -> bool:
    default = model == "llama" or file.meta("tokenizer.ggml.pre") in ("llama-bpe", "llama3")
    return bool(file.meta("tokenizer.ggml.add_bos_token", default))


def _byte_level(file: Metadata, tokens: list[str]) -> dict[str, Any]:
    """GPT-2's byte-level BPE (the vocabulary is in its byte alphabet already); what differs is how text is split."""
    pre = file.meta("tokenizer.ggml.pre", "default")
    splits: dict[str, list[dict[str, Any]]] = {
        "gpt-2": [_bytes(use_regex=True)],
        "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)],
        "llama-bpe": [_split(LLAMA3_PATTERN), _bytes(use_regex=False)],
        "qwen2": [_split(QWEN2_PATTERN), _bytes(use_regex=False)],
    }
    splits["llama3"] = splits["llama-bpe"]
    if pre not in splits:
        raise EngineError(
            f"{file.path} splits text by {pre!r}; the builtin engine knows {', '.join(sorted(splits))}: name another "
            "--model"
        )
    normalizer = {"type": "NFC"} if pre == "qwen2" else None
    merges = [merge.split(" ", 1) for merge in file.meta("tokenizer.ggml.merges", [])]
    model = _bpe(tokens, merges, ignore_merges=pre in ("llama-bpe", "llama3"))
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": splits[pre]}
    return _tokenizer(normalizer, pre_tokenizer, _bytes(use_regex=True) | {"trim_offsets": False}, decoder, model)


def _sentencepiece(file: Metadata, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """SentencePiece BPE: the merges are all ways to make a piece from two others, best score first."""
    scores = file.meta("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise EngineError(f"{file.path} has no scores for its vocabulary: name another --model")
    ids = {token: index for index, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for index, piece in enumerate(tokens):
        if types[index] in (NORMAL, UNUSED):
            for cut in range(1, len(piece)):
                left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
                if left is not None and right is not None:
                    ranked.append((-scores[index], left, right, piece[:cut], piece[cut:]))
    ranked.sort(key=lambda merge: merge[:3])
    unknown = file.meta("tokenizer.ggml.unknown_token_id", 0)
    model = _bpe(tokens, [[left, right] for *_, left, right in ranked], ignore_merges=False)
    model |= {"unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": True}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = bool(file.meta("tokenizer.ggml.add_space_prefix", True))
    normalizers = [{"type": "Prepend", "prepend": "▁"}, space] if prefix else [space]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _tokenizer(
        {"type": "Sequence", "normalizers": normalizers},
        None,
        None,
        {"type": "Sequence", "decoders": decoders},
        model,
    )


# ---- parts of tokenizer.json


def _tokenizer(
    normalizer: object, pre_tokenizer: object, post_processor: object, decoder: object, model: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def _bpe(tokens: list[str], merges: list[list[str]], *, ignore_merges: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    }


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _added(index: int, token: str, special: bool) -> dict[str, Any]:
    return {
        "id": index,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _begin_with(token: str, index: int, rest: object) -> dict[str, Any]:
    """Put the beginning-of-sequence token before each text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, first, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
    return template if rest is None else {"type": "Sequence", "processors": [rest, template]}
