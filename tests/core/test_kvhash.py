"""The hashes that peers compare: every version must compute the same (docs/design/kv-hash.md)."""

from __future__ import annotations

import re
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from p2pdyn.core.kvhash import block_hashes, chain, root_seed, sequence_hashes

PAGE = Path(__file__).parents[2] / "docs" / "design" / "kv-hash.md"
ROW = re.compile(r"\| (\S*) \| (\S*) \| (\d+) \| `([0-9a-f]{16})` \| `([0-9a-f ]+)` \|")


def ids(*tokens: int) -> bytes:
    return array("I", tokens).tobytes()


def vectors() -> list[tuple[str, ...]]:
    return ROW.findall(PAGE.read_text())


def test_the_page_has_vectors() -> None:
    assert len(vectors()) == 5


@pytest.mark.parametrize(("lora", "salt", "size", "seed", "hashes"), vectors())
def test_the_page_s_vectors_hold(lora: str, salt: str, size: str, seed: str, hashes: str) -> None:
    """Each is over token ids 0 to 47."""
    root = root_seed(lora, salt)

    assert f"{root:016x}" == seed
    assert " ".join(f"{s:016x}" for s in sequence_hashes(ids(*range(48)), int(size), root)) == hashes


def test_the_formula_spelt_out() -> None:
    first, second = (xxh3_64_intdigest(ids(*block), 1337) for block in ((1, 2), (3, 4)))
    joined = xxh3_64_intdigest(first.to_bytes(8, "little") + second.to_bytes(8, "little"), 1337)

    assert block_hashes(ids(1, 2, 3, 4, 5), 2) == [first, second]
    assert sequence_hashes(ids(1, 2, 3, 4, 5), 2) == [first, joined]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 8), st.integers(0, 5), st.text(max_size=3))
def test_a_chain_can_be_continued_and_names_its_prefix(tokens: list[int], size: int, cut: int, salt: str) -> None:
    seed = root_seed(salt=salt)
    whole = sequence_hashes(ids(*tokens), size, seed)
    cut = min(cut, len(whole))

    assert len(whole) == len(tokens) // size
    assert sequence_hashes(ids(*tokens[: cut * size]), size, seed) == whole[:cut]
    if cut:
        behind = block_hashes(ids(*tokens[cut * size :]), size)
        assert chain(whole[cut - 1], behind) == whole[cut:]


def test_lora_and_salt_do_not_run_into_each_other() -> None:
    seeds = [root_seed(*names) for names in (("", ""), ("ab", ""), ("", "ab"), ("a", "b"), ("b", "a"))]

    assert len(set(seeds)) == 5
    assert seeds[0] == 1337
