"""The forward pass: a position's logits are the same bits however it comes to be computed."""

from __future__ import annotations

from array import array
from dataclasses import replace

import numpy as np
import pytest

from p2pdyn.engines.builtin import tiles
from p2pdyn.engines.builtin.checkpoint import pack, shapes
from p2pdyn.engines.builtin.model import Llama, LlamaConfig, Rows
from p2pdyn.engines.builtin.tiles import F32, GROUP, Linear, Threads, least_rows, tile, tile_width
from p2pdyn.engines.builtin.tiny import TINY, random_tensors

SIZE = 8
LENGTH = 61
IDS = array("I", np.random.default_rng(0).integers(0, 200, LENGTH).tolist())


def make(config: LlamaConfig = TINY, threads: int = 1, blocks: int = 64) -> Llama:
    tensors = dict(pack(config, random_tensors(shapes(config)), None))
    return Llama(config, tensors, blocks, SIZE, Threads(threads))


def in_chunks(model: Llama, chunk: int, blocks: list[int], upto: int = LENGTH) -> dict[int, F32]:
    """Logits at the end of each chunk."""
    found = {}
    for start in range(0, upto, chunk):
        end = min(upto, start + chunk)
        found[end - 1] = model.forward([Rows(IDS[start:end], start, blocks, logits=True)])[0]
    return found


CONFIGS = {
    "grouped": TINY,
    "one key head": replace(TINY, kv_heads=1),
    "as many key heads": replace(TINY, kv_heads=4),
    "tied, odd sizes": replace(TINY, dim=80, heads=5, kv_heads=5, hidden=100, vocab=203, outputs=203, tied=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("chunk", [7, 16, 33, LENGTH])
def test_prompts_in_chunks_give_the_bits_of_decoding(config: LlamaConfig, chunk: int) -> None:
    model = make(config)
    alone = in_chunks(model, 1, list(range(8)))
    scattered = [int(block) for block in np.random.default_rng(1).permutation(range(8, 64))[:8]]

    for position, logits in in_chunks(model, chunk, scattered).items():
        assert np.array_equal(logits, alone[position])


def test_a_batch_gives_the_bits_of_each_sequence_alone() -> None:
    model = make(blocks=200)
    alone = in_chunks(model, 1, list(range(8)))
    lengths = [1, 2, 9, 16, 17, 30, 45, 60, 3, 8, 24]
    tables = [list(range(8 + 9 * i, 17 + 9 * i)) for i in range(len(lengths))]
    for table, length in zip(tables, lengths, strict=True):
        model.forward([Rows(IDS[:length], 0, table, logits=False)])

    decode = [Rows(IDS[n : n + 1], n, table, logits=True) for table, n in zip(tables, lengths, strict=True)]
    prompt = Rows(IDS[:40], 0, list(range(120, 128)), logits=True)
    logits = model.forward([*decode[:4], prompt, *decode[4:]])

    assert np.array_equal(logits[4], alone[39])
    for row, n in zip([*logits[:4], *logits[5:]], lengths, strict=True):
        assert np.array_equal(row, alone[n])


def test_where_the_blas_fails_the_trial_groups_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "least_rows", lambda: GROUP)
    model = make()
    alone = in_chunks(model, 1, list(range(8)))

    for position, logits in in_chunks(model, 13, list(range(8, 16))).items():
        assert np.array_equal(logits, alone[position])


def test_threads_change_no_bit() -> None:
    config = replace(TINY, dim=512, heads=8, kv_heads=4, head_dim=64, hidden=1024)
    one, three = make(config), make(config, threads=3)
    try:
        assert np.array_equal(
            one.forward([Rows(IDS[:20], 0, [0, 1, 2], logits=True)]),
            three.forward([Rows(IDS[:20], 0, [0, 1, 2], logits=True)]),
        )
    finally:
        three._layers[0].qkv._threads.close()


def test_a_block_is_one_byte_range_that_can_be_moved() -> None:
    """Copied to other blocks of another worker, the KV serves there as it did here."""
    here, there = make(), make()
    expected = in_chunks(here, 1, list(range(8)))[LENGTH - 1]
    in_chunks(here, 60, list(range(8)), upto=60)
    for index in range(8):
        assert len(here.block(index)) == here.block_bytes
        there.block(50 - index)[:] = here.block(index)

    moved = there.forward([Rows(IDS[60:], 60, [50 - index for index in range(8)], logits=True)])[0]

    assert np.array_equal(moved, expected)


def test_a_wrong_byte_in_a_block_shows() -> None:
    model = make()
    expected = in_chunks(model, 1, list(range(8)))[LENGTH - 1]
    model.block(3)[4:8] = np.float32(3.0).tobytes()

    assert not np.array_equal(model.forward([Rows(IDS[60:], 60, list(range(8)), logits=True)])[0], expected)


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (65, 576), (192, 1536), (30, 9000), (1, 5)])
def test_tiled_products_are_products(outputs: int, inputs: int) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((outputs, inputs), np.float32)
    linear = Linear(tile(weight, tile_width(inputs)), outputs, Threads(1))

    for rows in (1, 2, 7, 8, 9, 16, 30):
        x = rng.standard_normal((rows, inputs), np.float32)
        assert np.allclose(linear(x), x @ weight.T, rtol=1e-4, atol=1e-3)
    assert np.array_equal(linear.rows(np.arange(outputs)), weight)


def test_this_blas_needs_two_rows_or_a_whole_group() -> None:
    assert least_rows() in (2, GROUP)
