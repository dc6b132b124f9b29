"""The bundle, untouched, decodes as a plain language model in onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dynamo_runtime.bundle import load_bundle
from dynamo_runtime.session import Session

genai = pytest.importorskip("onnxruntime_genai")
PARALLEL = ["neox", "llama-linear-tied", "qwen3-wide-heads", "mistral-window"]


@pytest.mark.parametrize("name", [*PARALLEL, "cp-qwen2", "lookahead-llama-tied"])
def test_greedy_tokens_agree(name: str, bundle: Callable[[str], Path], checkpoint: Callable[[str], Path]) -> None:
    """Its tokens equal transformers' and our own session's, over the model's whole context."""
    prompt, length = [5, 17, 99, 4, 30], 96
    folder = bundle(name)
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["filename"]) == (2, "model.onnx"), "of the base alone"
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    theirs = np.asarray(generator.get_sequence(0)).tolist()
    base = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    expected = base.generate(torch.tensor([prompt]), max_length=length, do_sample=False, pad_token_id=0)[0].tolist()
    assert theirs == expected[: len(theirs)] and len(theirs) > len(prompt) + 10
    session = Session(load_bundle(folder))
    ours, step = list(prompt), session.step(prompt)
    while len(ours) < len(theirs):
        ours.append(int(step.logits().argmax()))
        step = session.step(ours[-1:])
    assert ours == theirs


def test_its_tokenizer_agrees(bundle: Callable[[str], Path]) -> None:
    """Text becomes the same tokens in both."""
    folder = bundle("neox")
    text = "def fib(n):\n    return n"
    theirs = np.asarray(genai.Tokenizer(genai.Model(str(folder))).encode(text)).tolist()
    assert theirs == load_bundle(folder).tokenizer.encode(text).ids
