"""Outputs of a bundle beside what torch says: how far they differ, and whether they decide alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from dynamo_runtime.step import Step

from .errors import ExportError

TOLERANCE = 1e-4

# What is compared, by name of the output. Every array is [positions, parts, width]: the factors of a joint head are
# n_tokens · rank parts, each with a tolerance of its own; any other output is one part.
Values = dict[str, np.ndarray]

# What one pass put out, and what torch says of the same positions.
PassOutputs = tuple[Step, Values]

# Reads one output of a pass by name, and its top-K logits and ids if it has any, as [rows, parts, width] each; what
# torch says of the same positions has the tokens that conditioned heads are told.
PutOut = Callable[[Step, str, Values], tuple[np.ndarray, ...]]

TOLD = "before_"  # begins the name of what is no output but the token that a head is told, [positions, 1, 1]


@dataclass(frozen=True)
class Case:
    """Two sequences around one boundary and what torch says of them.

    Attributes:
        name: What the boundary is.
        tokens: int64 [length].
        other: As `tokens` up to `fork`, other tokens from there on.
        start: First position whose logits are compared.
        fork: First position in which `other` differs.
        expected: What torch puts out at positions from `start` on.
        expected_other: The same for `other`.
        implementation: transformers' attention that made them.
    """

    name: str
    tokens: np.ndarray
    other: np.ndarray
    start: int
    fork: int
    expected: Values
    expected_other: Values
    implementation: str


def between(values: Values, begin: int, end: int) -> Values:
    """Return some positions of all outputs."""
    return {name: array[begin:end] for name, array in values.items()}


@dataclass
class Deviation:
    """How far one output of the bundle is from torch, in one way of running one case: a line of the table.

    Attributes:
        case: Boundary.
        length: Tokens of the sequence.
        run: How it was run.
        output: Name of the output.
        difference: Largest |Δlogit|; of several parts, that of the part which comes closest to its limit.
        limit: The largest allowed.
        rows: Positions compared.
        decided: Positions whose argmax torch decides by more than twice the difference.
        argmax: Of those, how many agree.
        topk: Whether the top-K outputs are the largest of the logits, where there are any.
        passed: Whether all of that is as it should be.
    """

    case: str
    length: int
    run: str
    output: str
    difference: float
    limit: float
    rows: int
    decided: int
    argmax: int
    topk: bool
    passed: bool


def deviations(case: Case, run: str, steps: Iterable[PassOutputs], put_out: PutOut) -> list[Deviation]:
    """Compare one way of running a case with torch.

    Args:
        case: What is run.
        run: How it was run.
        steps: Its passes; every one is read before the next is run.
        put_out: How the bundle's outputs are read.

    Returns:
        One an output.

    Raises:
        ExportError: An output has another shape.
    """
    rows = []
    read: dict[str, list[tuple[tuple[np.ndarray, ...], np.ndarray]]] = {}
    for step, values in steps:
        for name in values:
            if not name.startswith(TOLD):
                read.setdefault(name, []).append((put_out(step, name, values), values[name]))
    for name, pairs in read.items():
        found, theirs = [ours for ours, _ in pairs], [torchs for _, torchs in pairs]
        if [values.shape for values, *_ in found] != [values.shape for values in theirs]:
            raise ExportError(f"{name} is {found[0][0].shape} where {theirs[0].shape} is expected")
        parts = []
        for part in range(theirs[0].shape[1]):  # one at a time: a joint head's factors are many vocabularies
            ours, *top = (np.concatenate([values[:, part] for values in kind]) for kind in zip(*found, strict=True))
            expected = np.concatenate([values[:, part] for values in theirs])
            parts.append(_deviation(case, run, name, ours, expected, _is_top(ours, *top) if top else True))
        worst = max(parts, key=lambda row: (not row.passed, row.difference / row.limit))
        decided, argmax = sum(row.decided for row in parts), sum(row.argmax for row in parts)
        rows.append(replace(worst, decided=decided, argmax=argmax, topk=all(row.topk for row in parts)))
    return rows


def _is_top(logits: np.ndarray, values: np.ndarray, ids: np.ndarray) -> bool:
    """Tell whether `values` [rows, K] are the largest logits in descending order, and `ids` where they are."""
    if not ((ids >= 0) & (ids < logits.shape[1])).all():
        return False
    largest = -np.sort(-logits, axis=1)[:, : values.shape[1]]
    return bool(np.array_equal(values, largest) and np.array_equal(np.take_along_axis(logits, ids, 1), values))


def _deviation(case: Case, run: str, name: str, ours: np.ndarray, theirs: np.ndarray, topk: bool) -> Deviation:
    delta = np.abs(ours - theirs)
    difference = float(delta.max())
    limit = TOLERANCE * max(1.0, float(np.abs(theirs).max()))
    if theirs.shape[1] > 1:
        best = np.partition(theirs, -2, axis=1)
        decided = best[:, -1] - best[:, -2] > 2 * delta.max(axis=1)
    else:  # the gate of a single component
        decided = np.ones(len(theirs), bool)
    agree = (ours.argmax(1) == theirs.argmax(1)) & decided
    finite = bool(np.isfinite(ours).all())
    return Deviation(
        case=case.name,
        length=len(case.tokens),
        run=run,
        output=name,
        difference=difference,
        limit=limit,
        rows=len(ours),
        decided=int(decided.sum()),
        argmax=int(agree.sum()),
        topk=topk,
        passed=finite and difference <= limit and bool((agree == decided).all()) and topk,
    )


def table(rows: list[Deviation], left_out: list[str]) -> str:
    """Return the table as text: one line per case and run, the worst output in it."""
    lines = [f"{'case':<24}{'tokens':>7}  {'run':<12}{'max |Δlogit|':>13}{'limit':>9}  {'argmax':>11}  top-K"]
    groups: dict[tuple[str, int, str], list[Deviation]] = {}
    for row in rows:
        groups.setdefault((row.case, row.length, row.run), []).append(row)
    for (case, length, run), outputs in groups.items():
        worst = max(outputs, key=lambda row: (not row.passed, row.difference / row.limit))
        agreed = f"{sum(r.argmax for r in outputs)}/{sum(r.decided for r in outputs)}"
        mark = "" if all(r.passed for r in outputs) else f"  FAILED on {worst.output}"
        lines.append(
            f"{case:<24}{length:>7}  {run:<12}{worst.difference:>13.1e}{worst.limit:>9.1e}  {agreed:>11}  "
            f"{'ok' if all(r.topk for r in outputs) else 'no':>5}{mark}"
        )
    lines += [f"{name:<24}{'':>7}  not run: longer than --parity-length allows" for name in left_out]
    return "\n".join(lines)
