"""MAUVE of texts that are alike and of texts that are not, with features of the bundle and of a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import made_up
from transformers import AutoModel

from dynamo_evaluate import similarity
from dynamo_evaluate.errors import EvaluationError
from dynamo_evaluate.results import Results
from dynamo_evaluate.settings import PLAIN
from dynamo_evaluate.summary import summarize
from dynamo_export.source import load_model
from dynamo_runtime import Backend

TEXT = "def fib(n):\n    return"
BACKEND = Backend(provider="cpu", threads=1)


def test_features_of_a_bundle_are_its_penultimate_states(pair: Any) -> None:
    """The input of the last layer at the last token, as torch has it."""
    base, _ = load_model(pair.checkpoint, None)
    ids = similarity_ids(pair)
    with torch.inference_mode():
        states = base(torch.tensor([ids]), output_hidden_states=True).hidden_states
    features = similarity.features_of(str(pair.multi), BACKEND)
    assert features(TEXT) == pytest.approx(states[-2][0, -1].numpy(), abs=1e-4)
    assert features(TEXT) == pytest.approx(features(TEXT))


def test_features_of_a_model_folder(pair: Any) -> None:
    with torch.inference_mode():
        states = AutoModel.from_pretrained(pair.checkpoint)(torch.tensor([similarity_ids(pair)])).last_hidden_state
    assert similarity.features_of(str(pair.checkpoint), BACKEND)(TEXT) == pytest.approx(states[0, -1].numpy(), abs=1e-5)


def similarity_ids(pair: Any) -> list[int]:
    from dynamo_runtime.bundle import load_bundle

    ids: list[int] = load_bundle(pair.multi).tokenizer.encode(TEXT).ids
    return ids


def test_what_has_no_features(pair: Any, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="puts out no states"):
        similarity.features_of(str(pair.plain), BACKEND)
    with pytest.raises(EvaluationError, match="neither a bundle nor a folder"):
        similarity.features_of(str(tmp_path), BACKEND)


def test_alike_and_not_alike() -> None:
    """Texts of plain and of ε_b 1 are drawn from one distribution, those of ε_b 0.5 from another."""
    results: Results = made_up.grid(None, [0.5, 1.0], prompts=40, seeds=3)
    rng = np.random.default_rng(0)

    def features(text: str) -> np.ndarray:
        middle = 4.0 if "ε_b 0.5" in text else 0.0
        return rng.normal(middle, 1.0, 6).astype(np.float32) + np.eye(6, dtype=np.float32)[0]

    names = [PLAIN, "dynamo, ε_b 0.5", "dynamo, ε_b 1"]
    similarity.judge(results, features, "f", names[1:2])
    assert {record["setting"] for record in results.of("mauve")} == set(names[:2])
    similarity.judge(results, features, "f", names)
    found = summarize(results).outcomes
    assert found[PLAIN].measures["mauve"].value > 0.8
    assert found["dynamo, ε_b 1"].measures["mauve"].value > 0.8
    assert found["dynamo, ε_b 0.5"].measures["mauve"].value < 0.3
    count = len(results.records)
    similarity.judge(results, features, "f", names)  # nothing is left to do
    assert len(results.records) == count
    with pytest.raises(EvaluationError, match="has MAUVE by features of f"):
        similarity.judge(results, features, "g", names)


def test_scores_of_fewer_texts_are_made_again() -> None:
    results: Results = made_up.grid(None, [0.5, 1.0], prompts=12, seeds=2)
    missing = results.records.pop()
    rng = np.random.default_rng(0)
    for _ in range(2):
        similarity.judge(results, lambda text: rng.normal(size=4).astype(np.float32), "f", ["dynamo, ε_b 0.5"])
        results.records.append(missing)
    assert [record["texts"] for record in results.of("mauve")] == [11] * 4 + [12] * 4
