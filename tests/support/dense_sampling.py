"""Plain sampling in the plainest way: every logit on its own, all of them sorted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dynamo_runtime.parameters import SamplingParameters


def distribution(logits: np.ndarray, context: Sequence[int], p: SamplingParameters) -> dict[int, float]:
    """Probability of every token that may be drawn.

    Args:
        logits: A full row, [V].
        context: Tokens before.
        p: See `SamplingParameters`; of equal logits the smaller id comes first.
    """
    given = list(logits)
    for token in set(context):  # in the precision that the logits have
        given[token] = given[token] / p.repetition_penalty if given[token] > 0 else given[token] * p.repetition_penalty
    row = [float(logit) for logit in given]
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if p.greedy:
        return {order[0]: 1.0}
    order = order[: p.top_k or len(row)]
    weights = [math.exp(min((row[token] - row[order[0]]) / p.temperature, 0.0)) for token in order]
    total, kept, before = math.fsum(weights), dict[int, float](), 0.0
    for token, weight in zip(order, weights, strict=True):
        if (kept and p.top_p < 1 and before >= p.top_p * total) or weight < p.min_p or weight == 0:
            break
        kept[token] = weight
        before += weight
    return {token: weight / math.fsum(kept.values()) for token, weight in kept.items()}
