"""Whether drafting wrote plain decoding's text, and what became of drafts: what several benchmarks report."""

from __future__ import annotations

import numpy as np

from dynamo_runtime import Engine, Last

Said = str | list[int]
"""A prompt, or the tokens of a question."""


def pass_difference(engine: Engine, prompts: list[Said], width: int) -> float:
    """Largest |Δlogit| of the first head between one pass over `width` tokens and as many passes over one."""
    worst = 0.0
    for prompt in prompts:
        tokens = engine.encode(prompt)
        engine.reset()
        engine.session.step(tokens[:-width])
        at_once = engine.session.step(tokens[-width:], rows=Last(width)).logits()
        engine.session.cache.rollback(len(tokens) - width)
        one_by_one = np.concatenate([engine.session.step([token]).logits() for token in tokens[-width:]])
        worst = max(worst, float(np.abs(at_once - one_by_one).max()))
    return worst


def differences(
    plain: Engine, prompts: list[Said], expected: list[list[int]], found: list[list[int]], tie: float
) -> tuple[int, int, list[float]]:
    """Greedy texts that are not plain decoding's, how many of them part at a near tie, and the gaps there."""
    gaps = []
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        if ours == theirs:
            continue
        common = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        plain.reset()
        logits = plain.session.step([*plain.encode(prompt), *theirs[:common]]).logits()[-1]
        second, first = np.partition(logits, -2)[-2:]
        gaps.append(float(first - second))
    return len(gaps), sum(gap < tie for gap in gaps), gaps


def by_depth(counts: list[list[int]]) -> np.ndarray:
    """Sum of ragged lists of counts."""
    total = np.zeros(max((len(row) for row in counts), default=0), np.int64)
    for row in counts:
        total[: len(row)] += np.asarray(row, np.int64)
    return total
