"""A quantized bundle, its cache in int8 or fp16, decodes as a plain language model in onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dynamo_runtime import Bundle, Session

genai = pytest.importorskip("onnxruntime_genai")


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic", "fp16"])
def test_greedy_tokens_agree(scheme: str, smaller: Callable[..., Bundle]) -> None:
    """Its tokens equal our own session's."""
    bundle = smaller("parallel", scheme)
    prompt, length = [5, 17, 99, 4, 30], 64
    model = genai.Model(str(bundle.folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    theirs = np.asarray(generator.get_sequence(0)).tolist()
    session = Session(bundle, provider="cpu")
    ours, step = list(prompt), session.step(prompt)
    while len(ours) < len(theirs):
        ours.append(int(step.logits().argmax()))
        step = session.step(ours[-1:])
    assert ours == theirs and len(ours) > len(prompt) + 10
