"""A real chat model on vLLM: SmolLM2-135M-Instruct, converted from the GGUF file that `builtin` runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.nodes import Cluster, make_key, wait_for
from support.vllm_engine import ENVIRONMENT, START_S, needs_vllm

from p2pdyn.engines.builtin import weights

pytestmark = [needs_vllm, pytest.mark.timeout(700), pytest.mark.filterwarnings("default")]

NAME = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As safetensors, with the tokenizer and its chat template."""
    import torch
    import transformers

    gguf = weights.locate(None, False, weights.cache_folder(), lambda fraction, what: None)
    folder: Path = tmp_path_factory.mktemp("models") / NAME
    transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with Cluster(tmp_path, make_key(tmp_path)) as nodes:
        yield nodes


def test_it_answers_a_question_in_english(cluster: Cluster, model: Path) -> None:
    frontend = cluster.frontend("f")
    flags = ("--enforce-eager", "--dtype", "bfloat16", "--max-num-seqs", "2", "--max-model-len", "2048")
    args = ("--no-http", "--model", str(model), "--offline", "--", *flags)
    worker = cluster.start("w", *args, engine="vllm", seeds=[frontend]).wait_ready(START_S)
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
        wait_for(lambda: [one.id for one in client.models.list().data] == [NAME], 15, "the model is known")
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(
            model=NAME,
            messages=question,  # type: ignore[arg-type]
            max_tokens=24,
            temperature=0,
        )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model_extra is not None
    assert answer.model_extra["p2pdyn"]["workers"] == [worker.id]
