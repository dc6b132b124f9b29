"""Graphs that compute no numbers: one error that says so, whatever reads their logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.ids import without_addresses

from dynamo_runtime import BundleError, Engine, ParameterError
from dynamo_runtime.cli.run import main
from dynamo_runtime.scoring import score_texts

PROMPT = "def fib(n):\n    if n < 2:\n        return n\n"


def one_column(weights: np.ndarray) -> None:
    weights[:, 77] = np.nan


def all_of_it(weights: np.ndarray) -> None:
    weights[:] = np.nan


def too_large(weights: np.ndarray) -> None:
    weights[:, 5:9] *= np.inf


def damage(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    path = str(folder / "model.onnx")
    model = onnx.load(path)
    (weight,) = [each for each in model.graph.initializer if each.name == name]
    values = numpy_helper.to_array(weight).copy()
    change(values)
    weight.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, path)


@pytest.mark.parametrize("change", [one_column, all_of_it, too_large])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "autoregressive"},
        {"strategy": "autoregressive", "temperature": 0},
        {"strategy": "autoregressive", "top_k": 0},
        {"strategy": "autoregressive", "logits_processors": [lambda context, row: row]},
        {"strategy": "speculative", "log_probabilities": True},
        {"strategy": "speculative", "draft_choice": "sample"},
        {"strategy": "speculative", "temperature": 0, "repetition_penalty": 1.0},
        {"strategy": "auto"},
        {"strategy": "dynamo"},
        {"strategy": "dynamo", "top_k": 200, "backoff_threshold": 0.9, "cooccurrence_weight": 1.0},
    ],
    ids=without_addresses,
)
def test_every_strategy_says_so(copied, change: Callable, options: dict[str, Any]) -> None:
    damage(copied.folder, "output", change)
    copied.relist()
    with pytest.raises(BundleError, match=r"in a pass over \d+ tokens behind 0, gave .*that are not finite numbers"):
        Engine(copied.folder, threads=1).generate(PROMPT, seed=1, max_new_tokens=8, ignore_eos=True, **options)


def test_what_nobody_reads_is_in_nobodys_way(copied) -> None:
    """Not of the next pass, nor of closing; whoever reads it later is told."""
    damage(copied.folder, "output", all_of_it)
    copied.relist()
    session = Engine(copied.folder, threads=1).session
    held = session.step([1, 2])
    session.step([3, 4])
    session.close()
    for read in (held.best, held.topk, held.logits):
        with pytest.raises(BundleError, match="in a pass over 2 tokens behind 0, gave"):
            read()


def test_so_does_a_text_that_went_well_at_first(copied, capsys: pytest.CaptureFixture[str]) -> None:
    before = Engine(copied.folder, threads=1)
    options: dict[str, Any] = {"strategy": "autoregressive", "seed": 1, "ignore_eos": True, "max_new_tokens": 40}
    tokens = before.generate(PROMPT, **options).tokens
    seen = set(before.encode(PROMPT))
    late = next(place for place, token in enumerate(tokens) if place > 3 and token not in seen | {*tokens[:place]})

    def lose(rows: np.ndarray) -> None:
        rows[tokens[late]] = np.nan

    damage(copied.folder, "embedding", lose)
    copied.relist()
    engine = Engine(copied.folder, threads=1)
    stream = engine.stream(PROMPT, **options)
    with pytest.raises(BundleError, match="not finite numbers"):
        list(stream)
    assert stream.tokens == tokens[: late + 1]
    options["max_new_tokens"] = late
    assert engine.generate(PROMPT, **options).tokens == tokens[:late]  # nothing of it is left in the cache
    with pytest.raises(BundleError, match="not finite numbers"):
        score_texts(engine.session, [[*before.encode(PROMPT), *tokens]])
    assert main([str(copied.folder), PROMPT, "--strategy", "autoregressive", "--seed", "1"]) == 1
    assert capsys.readouterr().err.count("\n") <= 2


@pytest.mark.parametrize(
    "returns", [lambda row: row * np.nan, lambda row: row[:-1], lambda row: None, lambda row: ["x"] * len(row)]
)
def test_a_processor_has_to_return_numbers(engine: Engine, returns: Callable[[np.ndarray], Any]) -> None:
    for strategy in ("autoregressive", "dynamo"):
        with pytest.raises(ParameterError, match="a logits processor has to return 320 numbers"):
            engine.generate(PROMPT, strategy=strategy, logits_processors=[lambda context, row: returns(row)])
