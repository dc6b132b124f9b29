"""What stands in a results file: checked before it is read, as people edit such files and join them."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

from dynamo_runtime.registry import TOPOLOGIES

from .cells import MAUVE, PAIR, SCORE, WORTH
from .errors import EvaluationError
from .generate import GENERATION
from .perplexity import DOCUMENT
from .results import Record, Results

# A shape is a type, a function, a set of values, [shape of every item], {field: shape} or {...: shape of every value}.
Shape = Any


def _positive(value: Any) -> bool:
    return fits(value, _NUMBER) and 0 < value < math.inf


def _steps(value: Any) -> bool:
    """Return counts of passes by the tokens they gave, which JSON makes texts of."""
    return fits(value, {...: int}) and all(size.isdecimal() for size in value)


_NUMBER, _PERHAPS = int | float, int | float | None
_BUNDLE = {"name": str, "kind": set(TOPOLOGIES), "n_tokens": int, "precision": str}
_MACHINE = {name: str for name in ("processor", "provider", "onnxruntime", "python")}
_PLACE: Mapping[str, Shape] = {"setting": str, "prompt": str, "turn": int, "seed": int}
_SETTING = {"name": str, "variant": str, "threshold": _PERHAPS, "plain": bool, "strategy": str}
_SAMPLING = {"temperature": _NUMBER, "top_k": int, "repetition_penalty": _NUMBER}
GENERATIONS: Mapping[str, Shape] = {
    "bundle": _BUNDLE,
    "plain": _BUNDLE,
    "machine": _MACHINE,
    "prompts": {"source": str, "sha256": str},
    "texts": [{"id": str, "turns": [str], "code": bool, "category": str}],
    "seeds": int,
    "max_new_tokens": int,
    "template": str,
    "sampling": _SAMPLING,
    "settings": [_SETTING],
}
PERPLEXITIES: Mapping[str, Shape] = {
    "bundles": [_BUNDLE],
    "machine": _MACHINE,
    "texts": [str],
    "documents": int,
    "window": int,
    "stride": int,
}
RECORDS: Mapping[str, Mapping[str, Shape]] = {
    GENERATION: {
        **_PLACE,
        "text": str,
        "tokens": _positive,
        "passes": _positive,
        "seconds": _positive,
        "steps": _steps,
        "measures": {...: _PERHAPS},
    },
    DOCUMENT: {
        "bundle": int,
        "document": str,
        "positions": int,
        "nll": [_NUMBER],
        "joint": _NUMBER,
        "dynamic": {...: {"passes": int, "tokens": int, "nll": _NUMBER}},
    },
    MAUVE: {"setting": str, "seed": int, "texts": int, "features": str, "value": _NUMBER},
    SCORE: {**_PLACE, "score": _PERHAPS, "judge": str},
    PAIR: {**_PLACE, "verdict": {*WORTH, None}, "plain_first": bool, "judge": str},
}
"""By their kind."""
OPTIONAL: Mapping[str, Mapping[str, Shape]] = {
    DOCUMENT: {"covered": {"tokens": [int], "runs": [int], "runs_nll": [_NUMBER], "joint": int, "dynamic": {...: int}}}
}
"""What a record may have besides."""


def check(results: Results) -> Results:
    """See that results are as `dynamo-eval` writes them; returns them.

    Raises:
        EvaluationError: A line is not; the message names it and its field.
    """
    header: Record = results.header
    _demand(results, 1, header, PERPLEXITIES if header["command"] == "perplexity" else GENERATIONS)
    for number, record in enumerate(results.records, 2):
        optional = {name: shape for name, shape in OPTIONAL.get(record["kind"], {}).items() if name in record}
        _demand(results, number, record, {**RECORDS.get(record["kind"], {}), **optional})
    return results


def _demand(results: Results, number: int, line: Record, shape: Mapping[str, Shape]) -> None:
    for name, wanted in shape.items():
        if name not in line or not fits(line[name], wanted):
            raise EvaluationError(
                f"line {number} of {results.path} is not as dynamo-eval writes it: see its field {name!r}"
            )


def fits(value: Any, shape: Shape) -> bool:
    """Tell whether a JSON value has a shape; true and false are no numbers."""
    if isinstance(shape, types.FunctionType):
        return bool(shape(value))
    if isinstance(shape, set):
        return isinstance(value, str | None) and value in shape
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return False
        if ... in shape:
            return all(fits(item, shape[...]) for item in value.values())
        return all(name in value and fits(value[name], each) for name, each in shape.items())
    if isinstance(value, bool):
        return shape is bool
    return isinstance(value, shape)
