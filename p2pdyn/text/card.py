"""Model cards: what a frontend needs of a model to speak text for it.

A worker builds its card with :func:`from_folder` or :func:`byte_level`; a frontend fetches the packed bytes from any
worker, by digest, and so needs no model files.  A card comes from a peer, so :meth:`ModelCard.unpack` checks every size
and type: it is data only, never code.  Neither side imports `tokenizers` or `jinja2` here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgpack

CARD_VERSION = 1
MAX_TOKENIZER = 64 * 2**20
"""Bytes: the largest tokenizer.json in the field is about half of it."""
MAX_TEMPLATE = 256 * 1024
"""Bytes: the largest chat templates in the field have about 30 kB."""
MAX_CARD = MAX_TOKENIZER + MAX_TEMPLATE + 64 * 1024
MAX_EOS = 64
MAX_TOKEN_TEXT = 256
MAX_FEATURES = 32
MAX_TOKEN_ID = 2**32 - 1
MAX_CONTEXT = 2**31

GENERATION_BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
}
"""The generation defaults that a card may carry, with their range; what else a model folder says is left out."""


class CardError(ValueError):
    """A card or model folder that cannot be used; the message is one sentence with the mend."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Tokenizer, chat template and generation defaults of one model, and what its engine honours.

    ``tokenizer_json`` is the Hugging Face `tokenizers` format; ``chat_template`` is Jinja source or empty (then chat is
    refused); ``context`` is in tokens, 0 if unknown; ``generation`` has keys of :data:`GENERATION_BOUNDS` only;
    ``features`` is EngineInfo.features, by which the frontend answers 400 for what the engine would ignore.
    """

    tokenizer_json: bytes
    chat_template: str
    eos_token_ids: tuple[int, ...]
    bos_token: str = ""
    eos_token: str = ""
    context: int = 0
    generation: dict[str, float] = field(default_factory=dict)
    features: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """The card as bytes: equal cards give equal bytes, so that :attr:`digest` names the content."""
        packed: bytes = msgpack.packb(
            [
                CARD_VERSION,
                self.tokenizer_json,
                self.chat_template,
                list(self.eos_token_ids),
                self.bos_token,
                self.eos_token,
                self.context,
                sorted((name, float(value)) for name, value in self.generation.items()),
                sorted(self.features),
            ]
        )
        return packed

    @property
    def digest(self) -> str:
        """32 hex digits: BLAKE2b-128 of :meth:`pack` (10 ms for a 10 MB tokenizer, so keep it)."""
        return digest_of(self.pack())

    @classmethod
    def unpack(cls, data: bytes) -> ModelCard:
        """Read what a peer sent. Raises CardError unless every field has its type and keeps its cap."""
        if len(data) > MAX_CARD:
            raise CardError(f"model card has {len(data)} bytes; at most {MAX_CARD} are accepted")
        try:
            parts = msgpack.unpackb(
                data, use_list=True, raw=False, strict_map_key=True, max_array_len=64, max_map_len=0
            )
        except (
            Exception
        ) as error:  # msgpack raises several unrelated classes, ValueError and UnicodeDecodeError among them
            raise CardError("model card is not valid msgpack") from error
        if not isinstance(parts, list) or not parts or parts[0] != CARD_VERSION:
            raise CardError("model card has an unknown version: upgrade the older node")
        if len(parts) != 9:
            raise CardError("model card has a wrong number of fields")
        return _checked(parts)


def digest_of(packed: bytes) -> str:
    """The content hash of packed card bytes, without reading them."""
    return hashlib.blake2b(packed, digest_size=16).hexdigest()


def _checked(parts: list[Any]) -> ModelCard:
    _, tokenizer, template, eos, bos, eos_token, context, generation, features = parts
    if type(tokenizer) is not bytes or len(tokenizer) > MAX_TOKENIZER:
        raise CardError("model card's tokenizer is not bytes or too large")
    return ModelCard(
        tokenizer,
        _text(template, MAX_TEMPLATE, "chat template"),
        tuple(_integer(token, MAX_TOKEN_ID, "eos token id") for token in _items(eos, MAX_EOS, "eos token ids")),
        _text(bos, MAX_TOKEN_TEXT, "bos token"),
        _text(eos_token, MAX_TOKEN_TEXT, "eos token"),
        _integer(context, MAX_CONTEXT, "context"),
        dict(_default(item) for item in _items(generation, len(GENERATION_BOUNDS), "generation defaults")),
        tuple(_text(item, 32, "feature") for item in _items(features, MAX_FEATURES, "features")),
    )


def _text(value: object, cap: int, what: str) -> str:
    if type(value) is not str or len(value.encode("utf-8", "surrogatepass")) > cap:
        raise CardError(f"model card's {what} is not text of at most {cap} bytes")
    return value


def _integer(value: object, top: int, what: str) -> int:
    if type(value) is not int or not 0 <= value <= top:
        raise CardError(f"model card's {what} is not an integer from 0 to {top}")
    return value


def _items(value: object, cap: int, what: str) -> list[Any]:
    if type(value) is not list or len(value) > cap:
        raise CardError(f"model card's {what} are not a list of at most {cap}")
    return value


def _default(item: object) -> tuple[str, float]:
    if type(item) is not list or len(item) != 2 or type(item[0]) is not str or type(item[1]) is not float:
        raise CardError("model card's generation defaults are not (name, number) pairs")
    low, high = GENERATION_BOUNDS.get(item[0], (1.0, 0.0))
    if not low <= item[1] <= high:
        raise CardError(f"model card's generation default {item[0][:32]!r} is unknown or out of range")
    return item[0], item[1]


# ---- from a model folder, on the worker


def from_folder(path: str | Path, features: Iterable[str] = ()) -> ModelCard:
    """The card of a Hugging Face model folder: tokenizer.json is a must, all else is optional.

    Raises CardError with the mend when the folder is not usable, a tokenizer of another format included.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CardError(f"model folder {folder} does not exist")
    tokenizer_json = _tokenizer_file(folder)
    config, settings = _json(folder / "config.json"), _json(folder / "tokenizer_config.json")
    generation = _json(folder / "generation_config.json")
    bos_token, eos_token = _token_text(settings.get("bos_token")), _token_text(settings.get("eos_token"))
    eos = [*_token_ids(generation.get("eos_token_id")), *_token_ids(config.get("eos_token_id"))]
    eos += [token for token in (token_id(tokenizer_json, eos_token),) if token is not None]
    return ModelCard(
        tokenizer_json,
        _template_of(folder, settings),
        tuple(dict.fromkeys(eos))[:MAX_EOS],
        bos_token,
        eos_token,
        _context_of(config),
        _defaults_of(generation),
        tuple(sorted(features)),
    )


def _tokenizer_file(folder: Path) -> bytes:
    file = folder / "tokenizer.json"
    if not file.is_file():
        others = ("tokenizer.model", "spiece.model", "vocab.json", "tekken.json", "tiktoken.model")
        found = next((name for name in others if (folder / name).exists()), None)
        has = f"has {found} but no tokenizer.json" if found else "has no tokenizer.json"
        raise CardError(
            f"model folder {folder} {has}: convert it with transformers, "
            f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), or name another --model"
        )
    if file.stat().st_size > MAX_TOKENIZER:
        raise CardError(f"{file} is larger than {MAX_TOKENIZER // 2**20} MB: name another --model")
    return file.read_bytes()


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise CardError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CardError(f"{file} is not a JSON object")
    return content


def _template_of(folder: Path, settings: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    template: object = file.read_text(encoding="utf-8") if file.is_file() else None
    if template is None:
        template = _json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several named ones: [{"name": "default", "template": ...}, ...]
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None:
        return ""
    if not isinstance(template, str) or len(template.encode()) > MAX_TEMPLATE:
        raise CardError(f"the chat template in {folder} is not text of at most {MAX_TEMPLATE} bytes")
    return template


def _token_text(value: object) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and len(text.encode()) <= MAX_TOKEN_TEXT else ""


def _token_ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int and 0 <= token <= MAX_TOKEN_ID]


def token_id(tokenizer_json: bytes, text: str) -> int | None:
    """The id of a token by its text, from the added tokens and the vocabulary of a tokenizer.json."""
    if not text:
        return None
    try:
        content = json.loads(tokenizer_json)
        for entry in content.get("added_tokens") or ():
            if entry.get("content") == text:
                return int(entry["id"])
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            found = vocabulary.get(text)
            return found if type(found) is int else None
        return next((index for index, entry in enumerate(vocabulary) if entry[0] == text), None)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CardError(f"tokenizer.json is not a tokenizer of the Hugging Face format: {error!r}") from error


def _context_of(config: dict[str, Any]) -> int:
    inner = config.get("text_config")
    for source in (config, inner if isinstance(inner, dict) else {}):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = source.get(name)
            if type(value) is int and 0 < value <= MAX_CONTEXT:
                return value
    return 0


def _defaults_of(generation: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, (low, high) in GENERATION_BOUNDS.items():
        value = generation.get(name)
        if isinstance(value, int | float) and math.isfinite(value) and low <= value <= high:
            found[name] = float(value)
    return found


# ---- the built-in card

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
END_OF_TEXT, IM_START, IM_END = 256, 257, 258
"""Special ids of the byte-level card; ids 0 to 255 are the bytes themselves."""


@cache
def byte_level(features: tuple[str, ...] = (), context: int = 0) -> ModelCard:
    """A card that needs no model: one token a UTF-8 byte (the id is the byte), three specials, ChatML."""
    return ModelCard(
        (Path(__file__).parent / "byte_level.json").read_bytes(),
        CHATML,
        (END_OF_TEXT, IM_END),
        "<|endoftext|>",
        "<|im_end|>",
        context,
        {},
        tuple(sorted(features)),
    )
