"""Reading a model folder for `sim` beside the peer's loop."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from p2pdyn.engines.base import EngineError, EngineInfo, EngineOptions
from p2pdyn.engines.runner import make_runner
from p2pdyn.engines.sim_model import read
from p2pdyn.text.card import ModelCard, digest_of

LAG_S = 0.1
"""The peer's own bound on its loop's delay while an engine loads."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer.json of more than 10 MB, laid out as those of large models are."""
    folder = tmp_path_factory.mktemp("large")
    words = {
        f"Ġ{''.join(chr(97 + number // 26**place % 26) for place in range(9))}": number for number in range(170_000)
    }
    merges = [[word[:3], word[3:]] for word in words] * 2
    model = {"type": "BPE", "vocab": words, "merges": merges}
    content = {"added_tokens": [{"id": len(words), "content": "<|end|>"}], "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert (folder / "tokenizer.json").stat().st_size > 10_000_000
    return folder


async def load_and_watch(folder: Path) -> tuple[EngineInfo, float]:
    """Load as a peer does; the engine's description and the loop's worst delay in seconds."""
    options = EngineOptions(str(folder), offline=True, data_dir=folder)
    runner = make_runner("sim", options, lambda step: None, print)
    loading = asyncio.ensure_future(runner.start(lambda fraction, what: None))
    worst, last = 0.0, time.monotonic()
    try:
        while not loading.done():
            await asyncio.sleep(0.001)
            now = time.monotonic()
            worst, last = max(worst, now - last), now
        return await loading, worst
    finally:
        await runner.close()


@pytest.mark.alone
def test_a_large_tokenizer_does_not_hold_up_the_loop(large: Path) -> None:
    for _ in range(3):  # another process may take the processor away, but hardly three times
        info, lag = asyncio.run(load_and_watch(large))
        if lag < LAG_S:
            break
    assert lag < LAG_S
    card = ModelCard.unpack(info.card)
    assert card.digest == digest_of(info.card)
    assert (card.eos_token_ids, card.eos_token) == ((170_000,), "<|end|>")


def test_a_reader_that_dies_is_an_error_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pdyn.engines.sim_model.sys.executable", "/bin/false")
    with pytest.raises(EngineError, match=f"{tmp_path} ended with code 1"):
        read(str(tmp_path), 100)


def test_a_reader_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = tmp_path / "python"
    hang.write_text("#!/bin/sh\nexec sleep 60\n")
    hang.chmod(0o755)
    monkeypatch.setattr("p2pdyn.engines.sim_model.sys.executable", str(hang))
    monkeypatch.setattr("p2pdyn.engines.sim_model.READ_S", 0.1)
    with pytest.raises(EngineError, match="could not be read within"):
        read(str(tmp_path), 100)
