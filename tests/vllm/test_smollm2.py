"""A real chat model on vLLM: SmolLM2-135M-Instruct, converted from the GGUF file that `builtin` runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import openai
import pytest
from support.ahead import Ahead, Place
from support.nodes import Cluster, NodeProcess, make_key, wait_for
from support.vllm_engine import START_S, needs_vllm

from p2pdyn.engines.builtin import weights

pytestmark = [needs_vllm, pytest.mark.timeout(700)]

NAME = "SmolLM2-135M-Instruct"
CONVERT = """
import os, sys, torch, transformers
folder, file, target, *args = sys.argv[1:]
transformers.AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
).save_pretrained(target)
transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
os.execv(sys.executable, [sys.executable, "-m", "p2pdyn", *args])
"""
"""As safetensors, with the tokenizer and its chat template; then a node that serves it."""


@dataclass
class English:
    frontend: NodeProcess
    worker: NodeProcess


def begun(place: Place) -> English:
    gguf = weights.locate(None, False, weights.cache_folder(), lambda fraction, what: None)
    folder = place.folders.mktemp("english")
    model = folder / NAME
    cluster = place.ends.enter_context(Cluster(folder, make_key(folder)))
    frontend = cluster.frontend("f")
    flags = ("--enforce-eager", "--dtype", "bfloat16", "--max-num-seqs", "2", "--max-model-len", "2048")
    args = ("--no-http", "--model", str(model), "--offline", "--", *flags)
    program = (sys.executable, "-c", CONVERT, str(gguf.parent), gguf.name, str(model))
    return English(frontend, cluster.start("w", *args, engine="vllm", seeds=[frontend], program=program))


AHEAD = {"english": begun}


@pytest.fixture(scope="module")
def english(ahead: Ahead) -> Iterator[English]:
    made: English = ahead.begun("english")
    made.worker.wait_ready(START_S)
    ahead.loaded("english")
    yield made
    for node in (made.worker, made.frontend):
        node.stop()


def test_it_answers_a_question_in_english(english: English) -> None:
    with openai.OpenAI(base_url=f"{english.frontend.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
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
    assert answer.model_extra["p2pdyn"]["workers"] == [english.worker.id]
