"""What is measured of a text, against cases worked out by hand and against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dynamo_evaluate.commands.run import build_parser as eval_parser
from dynamo_evaluate.errors import EvaluationError
from dynamo_evaluate.measures import base_nll, distinct_share, measure, parsing_share
from dynamo_evaluate.settings import ABLATION, READINGS, curve, parse_thresholds, possible
from dynamo_runtime import Engine
from dynamo_runtime.cli import run
from dynamo_runtime.parameters import READINGS_OF_THE_PAPER


def test_distinct_share() -> None:
    assert distinct_share([1, 2, 1, 2, 1], 2) == 2 / 4  # 12, 21, 12, 21
    assert distinct_share([1, 2, 3], 3) == 1.0
    assert np.isnan(distinct_share([1, 2], 3))


@pytest.mark.parametrize(
    ("prompt", "output", "share"),
    [
        ("def f():\n", "    return 1\n", 1.0),
        ("def f():\n", "    return 1\n    ]]\n    x\n", 1 / 3),
        ("def f():\n", "    return 1\n    x = (", 1.0),  # the last line is not complete
        ("def f(:\n", "    return 1\n", 0.0),
        ("x = [1,\n", "2,\n3]\ny = =\n", 2 / 3),  # the first line parses only with the second
        ("x = 1\n", "y", float("nan")),
    ],
)
def test_parsing_share(prompt: str, output: str, share: float) -> None:
    assert parsing_share(prompt, output) == pytest.approx(share, nan_ok=True)


def test_likelihood_equals_torch(pair: Any, engines: tuple[Engine, Engine]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair.checkpoint).eval()
    rng = np.random.default_rng(1)
    prompt, output = rng.integers(1, 320, 20).tolist(), rng.integers(1, 320, 15).tolist()
    with torch.inference_mode():
        log_p = torch.log_softmax(model(torch.tensor([prompt + output])).logits[0].double(), -1)
    expected = -np.mean([float(log_p[19 + i, token]) for i, token in enumerate(output)])
    assert base_nll(engines[1], prompt, output) == pytest.approx(expected, rel=1e-5)
    assert base_nll(engines[0], prompt, output) == pytest.approx(expected, rel=1e-5)  # its first head is the base


def test_likelihood_of_what_exceeds_the_context(engines: tuple[Engine, Engine]) -> None:
    rng = np.random.default_rng(2)
    long, output = rng.integers(1, 320, 200).tolist(), rng.integers(1, 320, 10).tolist()
    assert base_nll(engines[1], long, output) == pytest.approx(base_nll(engines[1], long[-87:], output), rel=1e-6)


def test_empty_and_short_texts_have_no_figures(engines: tuple[Engine, Engine]) -> None:
    assert set(measure(engines[1], [1, 2], "def f():\n", "", [], True).values()) == {None}
    found = measure(engines[1], [1, 2], "def f():\n", "  x", [5, 6], False)
    assert found["distinct_2"] == 1.0 and found["distinct_3"] is None and found["nll"] is not None
    assert "parsing" not in found


def test_thresholds() -> None:
    assert parse_thresholds(["0:1:0.25", "0.5", "0.1"]) == [0, 0.1, 0.25, 0.5, 0.75, 1]
    assert len(parse_thresholds(["0:1:0.02"])) == 51  # the paper's
    for wrong in ("x", "2", "-0.1", "0:1", "0:1:0", "0:2:0.5", "0:1:0.00001", "1:0:0.1"):
        with pytest.raises(EvaluationError, match="back-off threshold"):
            parse_thresholds([wrong])


def test_ablation_is_the_papers() -> None:
    settings = curve([0.3, 0.5], ABLATION | READINGS)
    assert len(settings) == 2 * len(ABLATION | READINGS)
    assert len({setting.name for setting in settings}) == len(settings)
    named = {setting.name: setting.sampling for setting in settings}
    assert named["Otsu, blur, ε_b 0.5"] == {
        "cooccurrence_weight": 0.0, "adaptive_threshold": "blur", "backoff_threshold": 0.5
    }  # fmt: skip


def test_readings_of_the_paper_are_compared_but_have_no_flags() -> None:
    compared = {name for changes in (ABLATION | READINGS).values() for name in changes}
    assert compared == READINGS_OF_THE_PAPER | {"cooccurrence_weight", "first_token"}
    generate = ["generate", "BUNDLE", "--out", "run.jsonl"]
    for parser, given in ((run.build_parser(), []), (eval_parser(), generate)):
        flags = vars(parser.parse_args(given))
        assert {"cooccurrence_weight", "first_token"} <= flags.keys() and not READINGS_OF_THE_PAPER & flags.keys()


def test_what_a_bundle_cannot_run_is_left_out(engines: tuple[Engine, Engine]) -> None:
    multi, plain = (engine.bundle for engine in engines)
    found, refused = possible(curve([0.5]), multi, {"top_k": 50})
    assert len(found) == 1 and not refused
    found, refused = possible(curve([0.01], ABLATION), multi, {"top_k": 300})
    assert len(found) == len(ABLATION) - 1 and "Otsu, blur, ε_b 0.01: without the co-occurrence mask" in refused[0]
    with pytest.raises(EvaluationError, match="none of the settings"):
        possible(curve([0.5]), plain, {})
