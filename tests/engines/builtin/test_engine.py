"""What the builtin engine promises beyond the conformance tests of all engines."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import generate, sequence, text

from p2pdyn.engines.base import EngineError, EngineInfo, EngineOptions, Step
from p2pdyn.engines.builtin import BuiltinEngine, create, weights
from p2pdyn.engines.builtin.options import BuiltinOptions, default_threads, parse
from p2pdyn.engines.runner import make_runner
from p2pdyn.text.card import ModelCard

PROMPT = list(range(40, 90))


@pytest.fixture
def engine() -> Iterator[BuiltinEngine]:
    made = create(EngineOptions("tiny", args=("--kv-blocks=64",)))
    made.load(lambda fraction, what: None)
    yield made
    made.close()


def test_importing_it_loads_no_numpy() -> None:
    code = "import sys, p2pdyn.engines.builtin as b; b.create(b.engine.EngineOptions()); print('numpy' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout.strip() == "False"


def test_arguments() -> None:
    assert parse([]) == BuiltinOptions(threads=default_threads())
    assert parse(["--kv-blocks", "7", "--threads=3"]) == BuiltinOptions(kv_blocks=7, threads=3)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--kv-block", "7"], "it takes|after -- it takes --kv-blocks"),
        (["kv-blocks"], "does not know"),
        (["--kv-blocks"], "whole number from 2"),
        (["--kv-blocks", "x"], "whole number"),
        (["--threads=0"], "whole number from 1"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(args: list[str], sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence):
        create(EngineOptions("tiny", args=tuple(args)))


def test_the_load_report_is_measured(engine: BuiltinEngine) -> None:
    before = engine.load_report()
    assert before.prefill_tps > 100
    assert 0 < before.itl_ms < 1000

    engine.submit(sequence(0, PROMPT, max_tokens=3), 0.0)
    assert engine.load_report().queued == 1
    assert engine.load_report().prefill_tokens_queued == len(PROMPT)
    engine.step(0.0)
    during = engine.load_report()
    assert (during.active_requests, during.queued, during.prefill_tokens_queued) == (1, 0, 0)
    assert during.kv_used == math.ceil((len(PROMPT) + 1) / 16)


def test_ids_outside_the_vocabulary_are_refused(engine: BuiltinEngine) -> None:
    result = generate(engine, sequence(0, [5, 259]))[0]
    assert result.finish == "invalid"
    assert "259" in result.detail


def test_lower_priority_values_run_first() -> None:
    engine = create(EngineOptions("tiny", args=("--max-num-seqs=1",)))
    engine.load(lambda fraction, what: None)
    for key, priority in enumerate([5, 5, -1]):
        engine.submit(sequence(key, PROMPT, max_tokens=2, priority=priority), 0.0)
    order = [output.key for _ in range(6) for output in engine.step(0.0).outputs]
    engine.close()
    assert order == [2, 2, 0, 0, 1, 1]


def test_a_long_prompt_delays_others_by_its_chunks_only() -> None:
    engine = create(EngineOptions("tiny", args=("--max-batch-tokens=16", "--kv-blocks=64")))
    engine.load(lambda fraction, what: None)
    engine.submit(sequence(0, PROMPT[:5], max_tokens=40), 0.0)
    engine.step(0.0)
    engine.submit(sequence(1, PROMPT * 4, max_tokens=2), 0.0)
    keys = [[output.key for output in engine.step(0.0).outputs] for _ in range(15)]
    engine.close()
    assert all(0 in step for step in keys)
    assert 1 in keys[13]
    assert not any(1 in step for step in keys[:13])


def test_logprobs_are_of_the_chosen_tokens(engine: BuiltinEngine) -> None:
    result = generate(engine, sequence(0, PROMPT, max_tokens=8, logprobs=256))[0]

    assert len(result.logprobs) == 8
    for token, (chosen, row) in zip(result.tokens, result.logprobs, strict=True):
        assert row[0] == (token, chosen)  # greedy: the likeliest
        assert sum(math.exp(value) for _, value in row) == pytest.approx(1)


def test_penalties_change_the_text(engine: BuiltinEngine) -> None:
    plain = text(engine, PROMPT, max_tokens=40)
    penalised = text(engine, PROMPT, max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(penalised)) > len(set(plain))


def test_it_runs_in_the_engine_host(tmp_path: Path) -> None:
    steps: list[Step] = []

    async def main() -> EngineInfo:
        done = asyncio.Event()

        def on_step(step: Step) -> None:
            steps.append(step)
            if any(output.finish for output in step.outputs):
                done.set()

        options = EngineOptions("tiny", args=("--kv-blocks=64",), offline=True, data_dir=tmp_path)
        runner = make_runner("builtin", options, on_step, pytest.fail)
        async with asyncio.timeout(30):
            info = await runner.start(lambda fraction, what: None)
            runner.submit([sequence(1, PROMPT, max_tokens=5)])
            await done.wait()
            await runner.close()
        return info

    info = asyncio.run(main())

    assert (info.engine, info.model) == ("builtin", "tiny")
    assert [len(step.outputs) for step in steps] == [1] * 5


# ---- the real weights


@pytest.fixture(scope="module")
def smollm() -> Iterator[tuple[BuiltinEngine, ModelCard]]:
    if not (weights.cache_folder() / weights.FILE).exists():
        pytest.skip(f"{weights.DEFAULT_NAME} is not in {weights.cache_folder()}: start the builtin engine once")
    engine = create(EngineOptions(offline=True, args=("--kv-blocks=256",)))
    info = engine.load(lambda fraction, what: None)
    yield engine, ModelCard.unpack(info.card)
    engine.close()


def ask(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def encoder(card: ModelCard) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(card.tokenizer_json.decode())


@pytest.mark.model
@pytest.mark.timeout(180)
def test_smollm_answers_in_english(smollm: tuple[BuiltinEngine, ModelCard]) -> None:
    engine, card = smollm
    tokenizer = encoder(card)

    result = generate(engine, sequence(0, tokenizer.encode(ask("What is the capital of France?")).ids, max_tokens=40))[
        0
    ]

    assert result.finish == "stop"
    assert tokenizer.decode(result.tokens) == "The capital of France is Paris."


@pytest.mark.model
@pytest.mark.timeout(180)
def test_smollm_gives_the_same_ids_alone_batched_and_continued(smollm: tuple[BuiltinEngine, ModelCard]) -> None:
    """Rows are independent to the last bit, so equality is exact; see p2pdyn.engines.builtin.tiles."""
    engine, card = smollm
    tokenizer = encoder(card)
    prompts = [tokenizer.encode(ask(text)).ids for text in ("Name a fruit.", "Tell me a story.", "What is 2 + 2?")]
    options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "cache_salt": "alone"}
    alone = [text(engine, ids, **options) for ids in prompts]
    options["cache_salt"] = "batch"

    together = generate(engine, *(sequence(i, ids, **options) for i, ids in enumerate(prompts)))
    options["cache_salt"] = "again"
    rest = [text(engine, ids, whole[:9], **options) for ids, whole in zip(prompts, alone, strict=True)]

    assert [together[i].tokens for i in range(3)] == alone
    assert [whole[:9] + more for whole, more in zip(alone, rest, strict=True)] == alone
