"""What workers of one model must have in common, whichever engine says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pdyn.engines.hosted import weights_of


class TorchDtype:
    """As torch writes one."""

    def __str__(self) -> str:
        return "torch.bfloat16"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    return tmp_path


def test_engines_that_say_the_same_in_other_words_agree(folder: Path) -> None:
    said = weights_of(folder, TorchDtype(), None, "auto", False)
    assert said == weights_of(folder, "bfloat16", "", "bfloat16", False)
    fp8 = weights_of(folder, TorchDtype(), "fp8", "fp8", False)
    assert fp8 == weights_of(folder, "bfloat16", "fp8", "fp8_e4m3", False) != said


def test_what_changes_the_answers_changes_the_digest(folder: Path) -> None:
    said = weights_of(folder, "bfloat16", None, "auto", False)
    others = {
        weights_of(folder, "float16", None, "auto", False),
        weights_of(folder, "bfloat16", "awq", "auto", False),
        weights_of(folder, "bfloat16", None, "fp8", False),
        weights_of(folder, "bfloat16", None, "auto", True),
    }
    (folder / "model.safetensors").write_bytes(bytes(101))
    others.add(weights_of(folder, "bfloat16", None, "auto", False))
    (folder / "config.json").write_text('{"hidden_size": 65}')
    others.add(weights_of(folder, "bfloat16", None, "auto", False))
    assert len(others) == 6
    assert said not in others
