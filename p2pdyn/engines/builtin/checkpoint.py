"""From GGUF tensors to the form that the model reads: dequantised, fused, tiled.

The GGUF reader and the quantisations are the `gguf` package's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from p2pdyn.engines.base import EngineError, Progress
from p2pdyn.engines.builtin import packed
from p2pdyn.engines.builtin.model import LlamaConfig
from p2pdyn.engines.builtin.packed import Packed
from p2pdyn.engines.builtin.tiles import F32, tile, tile_width

log = logging.getLogger(__name__)


class GgufFile:
    """An open GGUF file of the `llama` architecture. Raises EngineError, with a sentence, for any other."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        class Reader(GGUFReader):
            """Slices of np.memmap cost as much again as all else; a plain view of it, three times as fast, does too."""

            def _get(self, *args: Any, **options: Any) -> Any:
                if isinstance(self.data, np.memmap):
                    self.data: Any = self.data.view(np.ndarray)
                return super()._get(*args, **options)

        self.path = path
        try:
            self._reader = Reader(path)
        except FileNotFoundError as error:
            raise EngineError(f"model file {path} does not exist: check --model") from error
        except Exception as error:  # the reader trusts its input: a broken file raises nearly anything
            raise EngineError(f"{path} is not a readable GGUF file ({error}): name another --model") from error
        architecture = self.meta("general.architecture", "unknown")
        if architecture != "llama":
            raise EngineError(
                f"{path} has the architecture {architecture!r}; the builtin engine runs only 'llama': "
                "name another --model, or use --engine vllm"
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def meta(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def config(self) -> LlamaConfig:
        """Raises EngineError for what the model does not do: experts, partial or scaled rotation, biases."""
        heads = self._number("llama.attention.head_count")
        dim = self._number("llama.embedding_length")
        head_dim = self._number("llama.attention.key_length", dim // heads)
        scaling = self.meta("llama.rope.scaling.type", "none")
        for wrong, what in (
            (self.meta("llama.expert_count", 0), "experts"),
            (scaling not in ("none", ""), f"{scaling!r} rope scaling"),
            (self.meta("llama.rope.dimension_count", head_dim) != head_dim, "partial rotation"),
            (self.meta("llama.attention.value_length", head_dim) != head_dim, "values of another size than keys"),
        ):
            if wrong:
                raise EngineError(f"{self.path} uses {what}, which the builtin engine lacks: name another --model")
        config = LlamaConfig(
            layers=self._number("llama.block_count"),
            dim=dim,
            heads=heads,
            kv_heads=self._number("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            hidden=self._number("llama.feed_forward_length"),
            vocab=len(self.raw("token_embd.weight").data),
            outputs=len(self.raw("token_embd.weight").data),
            context=self._number("llama.context_length"),
            norm_eps=float(self.meta("llama.attention.layer_norm_rms_epsilon", 1e-5)),
            rope_theta=float(self.meta("llama.rope.freq_base", 10000.0)),
            tied="output.weight" not in self._tensors,
        )
        extra = set(self._tensors) - set(shapes(config)) - {"rope_freqs.weight"}
        if extra:
            raise EngineError(f"{self.path} has tensors that a plain llama lacks ({min(extra)}): name another --model")
        return config

    def _number(self, key: str, default: int | None = None) -> int:
        value = self.meta(key, default)
        if type(value) is not int or value <= 0:
            raise EngineError(f"{self.path} lacks a usable {key}: name another --model")
        return value

    def raw(self, name: str) -> Any:
        if name not in self._tensors:
            raise EngineError(f"{self.path} lacks the tensor {name}: name another --model")
        return self._tensors[name]

    def tensor(self, name: str) -> F32:
        """Dequantised, ``[outputs, inputs]`` as the Hugging Face layout has it: query and key rows un-permuted."""
        from gguf.quants import dequantize

        raw = self.raw(name)
        try:
            data = np.asarray(dequantize(raw.data, raw.tensor_type), np.float32)
        except NotImplementedError as error:
            raise EngineError(
                f"{self.path} is quantised as {raw.tensor_type.name}, which the gguf package cannot read: "
                "name another --model, as Q8_0 or Q4_1"
            ) from error
        kind = name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            heads = self.meta("llama.attention.head_count")
            return unpermute(data, heads if kind == "attn_q" else self.meta("llama.attention.head_count_kv", heads))
        return data

    def rope_factors(self) -> F32 | None:
        """Llama 3's frequency factors, ``[head_dim / 2]``."""
        return self.tensor("rope_freqs.weight") if "rope_freqs.weight" in self._tensors else None


def unpermute(weight: F32, heads: int) -> F32:
    """GGUF interleaves each head's rotary pairs as (2i, 2i + 1); the model wants (i, i + head_dim / 2)."""
    outputs, inputs = weight.shape
    return weight.reshape(heads, outputs // heads // 2, 2, inputs).swapaxes(1, 2).reshape(outputs, inputs)


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its GGUF name, ``[outputs, inputs]``."""
    dim, queries, keys = config.dim, config.heads * config.head_dim, config.kv_heads * config.head_dim
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab, dim), "output_norm.weight": (dim,)}
    if not config.tied:
        found["output.weight"] = (config.outputs, dim)
    for i in range(config.layers):
        found |= {
            f"blk.{i}.attn_norm.weight": (dim,),
            f"blk.{i}.attn_q.weight": (queries, dim),
            f"blk.{i}.attn_k.weight": (keys, dim),
            f"blk.{i}.attn_v.weight": (keys, dim),
            f"blk.{i}.attn_output.weight": (dim, queries),
            f"blk.{i}.ffn_norm.weight": (dim,),
            f"blk.{i}.ffn_gate.weight": (config.hidden, dim),
            f"blk.{i}.ffn_up.weight": (config.hidden, dim),
            f"blk.{i}.ffn_down.weight": (dim, config.hidden),
        }
    return found


def pack(config: LlamaConfig, tensor: Callable[[str], F32], rope_factors: F32 | None) -> Iterator[tuple[str, F32]]:
    """The model's tensors, fused and tiled; ``tensor`` gives one by its GGUF name."""
    wanted = shapes(config)

    def get(name: str) -> F32:
        data = tensor(name)
        if data.shape != wanted[name]:
            raise EngineError(f"tensor {name} has the shape {data.shape}, not {wanted[name]}: name another --model")
        return data

    def tiled(*names: str) -> F32:
        weight = np.concatenate([get(f"{name}.weight") for name in names])
        return tile(weight, tile_width(weight.shape[1]))

    yield "norm", get("output_norm.weight")
    if rope_factors is not None:
        yield "rope_factors", rope_factors
    if not config.tied:
        yield "embedding", get("token_embd.weight")
    yield "head", tiled("token_embd" if config.tied else "output")
    for i in range(config.layers):
        block = f"blk.{i}."
        yield f"{i}.attn_norm", get(block + "attn_norm.weight")
        yield f"{i}.qkv", tiled(block + "attn_q", block + "attn_k", block + "attn_v")
        yield f"{i}.out", tiled(block + "attn_output")
        yield f"{i}.ffn_norm", get(block + "ffn_norm.weight")
        yield f"{i}.gate_up", tiled(block + "ffn_gate", block + "ffn_up")
        yield f"{i}.down", tiled(block + "ffn_down")


# ---- by way of the cache


def load(path: Path, cache: Path, progress: Progress) -> Packed:
    """A GGUF file in the model's form, by way of its packed file in ``cache``, made on first use. Where that cannot be
    written the tensors are unpacked into this process alone. Raises EngineError."""
    from p2pdyn.engines.builtin.weights import locked

    place = packed.place(path, cache)
    with contextlib.suppress(OSError, ValueError):
        return packed.read(place)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(place, progress, "another process unpacks the weights"):
            with contextlib.suppress(OSError, ValueError):
                return packed.read(place)
            packed.sweep(cache)
            _make_packed(path, place, progress)
            return packed.read(place)
    except OSError as error:
        log.warning("the unpacked weights cannot be kept in %s (%s): each worker keeps its own copy", cache, error)
    config, card, file = _open(path, progress)
    tensors = dict(pack(config, file.tensor, file.rope_factors()))
    return Packed(config, card, tensors, packed.digest(path))


def _open(path: Path, progress: Progress) -> tuple[LlamaConfig, bytes, GgufFile]:
    from p2pdyn.engines.builtin.tokenizer import model_card

    progress(0.45, f"reading {path.name}")
    file = GgufFile(path)
    config = file.config()
    return config, model_card(file, config.context).pack(), file


def _make_packed(path: Path, place: Path, progress: Progress) -> None:
    """Write beside the place, then rename: nobody maps half a file."""
    config, card, file = _open(path, progress)
    source, part = packed.Source.of(path), place.with_suffix(".part")
    try:
        with part.open("wb") as target:
            tensors = _told(pack(config, file.tensor, file.rope_factors()), len(shapes(config)), progress)
            packed.write(target, config, card, tensors, packed.digest(path), source)
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def _told(tensors: Iterator[tuple[str, F32]], total: int, progress: Progress) -> Iterator[tuple[str, F32]]:
    """``total`` counts them before they are fused."""
    for number, tensor in enumerate(tensors, 1):
        yield tensor
        progress(0.5 + 0.4 * min(1.0, 1.5 * number / total), "unpacking the weights")
