"""Ratios of sums over prompts, with 95 % bootstrap intervals: what several benchmarks report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

Interval = tuple[float, float, float]


def interval(statistic: Callable[..., NDArray[np.float64]], *samples: Sequence[float]) -> Interval:
    """Return a statistic of paired samples [prompts] with its 95 % percentile-bootstrap interval."""
    data = tuple(np.asarray(sample, dtype=np.float64) for sample in samples)
    if all(np.ptp(sample) == 0 for sample in data):
        value = float(statistic(*data, axis=-1))
        return value, value, value
    result = bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
        n_resamples=2000,
    )
    low, high = result.confidence_interval
    return float(statistic(*data, axis=-1)), float(low), float(high)


def ratio(top: NDArray[np.float64], bottom: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Sum over sum."""
    return top.sum(axis=axis) / bottom.sum(axis=axis)


def speed_ratio(
    tokens: NDArray[np.float64],
    seconds: NDArray[np.float64],
    plain_tokens: NDArray[np.float64],
    plain_seconds: NDArray[np.float64],
    axis: int,
) -> NDArray[np.float64]:
    """Return tokens a second over plain's."""
    return ratio(tokens, seconds, axis) / ratio(plain_tokens, plain_seconds, axis)
