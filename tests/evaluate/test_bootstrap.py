"""Quotients, spreads and regressions against cases worked out by hand, and intervals against repeated sampling."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.polynomial import Polynomial

from dynamo_evaluate.bootstrap import (
    GRID,
    Draws,
    Ends,
    Estimates,
    Quotient,
    fit,
    fit_curve,
    interval,
    same_quality,
    spread,
    widening,
)


def test_quotient_is_sum_over_sum() -> None:
    quotient = Quotient(np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[1.0, 1.0], [1.0, 3.0]]))
    assert quotient.value == 2.0
    assert quotient.by_seed().tolist() == [1.5, 2.25]


def test_texts_without_a_value_have_no_say() -> None:
    quotient = Quotient.mean(np.array([[1.0, np.nan], [5.0, np.nan]]))
    assert quotient.value == 3.0
    draws = Draws(np.array([[2.0, 0.0], [0.0, 2.0]]), np.ones((2, 2)), 2)
    assert quotient.replicates(draws)[0] == 3.0
    assert np.isnan(quotient.replicates(draws)[1])  # only the prompt without a value was drawn


def test_replicates_resample_prompts_and_keep_seeds_together() -> None:
    quotient = Quotient(np.array([[1.0, 10.0], [2.0, 20.0]]), np.ones((2, 2)))
    draws = Draws(np.array([[2.0, 0.0], [1.0, 1.0]]), np.ones((2, 2)), 2)
    assert quotient.replicates(draws).tolist() == [1.5, 8.25]
    assert quotient.replicates_by_seed(draws).tolist() == [[1.0, 2.0], [5.5, 11.0]]


def test_figures_without_prompts_resample_seeds() -> None:
    quotient = Quotient.mean(np.array([[1.0], [4.0]]))
    draws = Draws(np.ones((2, 7)), np.array([[2.0, 0.0], [1.0, 1.0]]), 7)
    assert quotient.replicates(draws).tolist() == [1.0, 2.5]


def test_turns_of_a_conversation_are_drawn_together() -> None:
    draws = Draws.make(["a", "a", "b", "c"], 3)
    assert draws.clusters == 3
    assert (draws.prompts[:, 0] == draws.prompts[:, 1]).all() and (draws.prompts[:, 1:].sum(1) == 3).all()
    assert not (draws.prompts[:, 1] == draws.prompts[:, 2]).all()
    alone = Quotient(np.array([[1.0, 2.0], [3.0, 4.0]]), np.ones((2, 2)))
    one = Draws.make(["a", "a"], 2)  # nothing but seeds to be resampled
    assert set(np.round(alone.replicates(one), 6)) == {1.5, 2.5, 3.5}
    other = Draws.make(["a", "a", "b", "c"], 3, stream=1)
    assert (other.prompts != draws.prompts).any()


def test_widening() -> None:
    """Two seeds: 12.706 √1.5 / 1.960."""
    assert widening(2) == pytest.approx(7.94, abs=0.01)
    assert widening(1000) == pytest.approx(1.0, abs=0.01)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """The mean of 40 texts: the interval should hold the truth in 95 of 100 runs; a few points less for so few."""
    rng = np.random.default_rng(3)
    draws = Draws.make(range(40), 1)
    hits = 0
    for _ in range(400):
        quotient = Quotient.mean(rng.normal(5.0, 2.0, (1, 40)))
        found = interval(quotient.value, quotient.replicates(draws))
        hits += found.low <= 5.0 <= found.high
    assert 0.90 <= hits / 400 <= 0.985


def test_spread_is_where_one_more_seed_would_lie() -> None:
    """Three seeds 1, 2, 3: mean 2, deviation 1, t(2) = 4.3027, times √(1 + 1/3)."""
    low, high = spread(np.array([1.0, 2.0, 3.0]))
    assert float(high) == pytest.approx(2 + 4.302653 * np.sqrt(4 / 3), rel=1e-6)
    assert float(low) == pytest.approx(2 - 4.302653 * np.sqrt(4 / 3), rel=1e-6)
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(4000, 5))
    low, high = spread(runs[:, :4])
    assert np.mean((runs[:, 4] >= low) & (runs[:, 4] <= high)) == pytest.approx(0.95, abs=0.012)


def test_fit_is_least_squares() -> None:
    """Points (0, 0), (1, 2), (2, 1): the line 0.5 + 0.5 x by the normal equations; the parabola goes through all."""
    x, y = np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0])
    assert fit(x, y, 1).convert().coef == pytest.approx([0.5, 0.5])
    assert fit(x, y, 2)(x) == pytest.approx(y)
    assert fit(x, y, 5).degree() == 2
    assert fit(np.ones(3), y, 2).degree() == 0


def traced(y: np.ndarray, plain: tuple[float, float], noise: float = 0.0, degree: int = 1):
    """A curve through speeds 1, 1.5, 2, 2.5, 3 whose replicates scatter."""
    x = np.linspace(1, 3, 5)
    rng = np.random.default_rng(1)
    replicates = y + noise * rng.normal(size=(300, 1))  # all settings share their prompts
    ends = np.full(300, plain[0]), np.full(300, plain[1])
    speed = Estimates(x, np.broadcast_to(x, (300, 5)))
    return fit_curve(speed, Estimates(y, replicates), Ends(plain, ends), degree)


def test_same_quality_is_where_the_line_leaves_plains_spread() -> None:
    """Quality 10 - 4 (x - 1) leaves [6, 11] at x = 2; with a noise of sd 0.4 in it, x has one of 0.1."""
    y = 10 - 4 * (np.linspace(1, 3, 5) - 1)
    found = same_quality([traced(y, (6, 11))])
    assert found.speed.value == pytest.approx(2.0, abs=0.005)
    assert found.speed.low == found.speed.high == found.speed.value
    assert found.share == 1.0
    noisy = same_quality([traced(y, (6, 11), noise=0.4)])
    assert (noisy.speed.high - noisy.speed.low) / 2 == pytest.approx(1.96 * 0.1, rel=0.2)
    band = traced(y, (6, 11), noise=0.4)
    assert (band.high - band.low) / 2 == pytest.approx(np.full(len(band.places), 1.96 * 0.4), rel=0.2)


def test_too_likely_is_outside_as_well() -> None:
    """A curve that leaves plain's spread upwards has left it."""
    y = 10 + 4 * (np.linspace(1, 3, 5) - 1)
    assert same_quality([traced(y, (9, 12))]).speed.value == pytest.approx(1.5, abs=0.005)


def test_no_speed_has_plains_quality() -> None:
    found = same_quality([traced(np.full(5, 3.0), (6, 11))])
    assert np.isnan(found.speed.value) and found.share == 0.0


def test_all_measures_at_once_is_the_intersection() -> None:
    x = np.linspace(1, 3, 5)
    early, late = traced(10 - 4 * (x - 1), (6, 11)), traced(x, (2, 2.5))  # inside up to 2; inside from 2 to 2.5
    assert same_quality([late]).speed.value == pytest.approx(2.5, abs=0.005)
    assert same_quality([early, late]).speed.value == pytest.approx(2.0, abs=0.005)


def test_band_follows_polynomial() -> None:
    curve = traced(np.linspace(1, 3, 5) ** 2, (0, 4), degree=2)
    assert isinstance(curve.polynomial, Polynomial)
    assert curve.fitted == pytest.approx(curve.places**2)
    assert same_quality([curve]).speed.value == pytest.approx(2.0, abs=0.005)


def test_every_replicate_is_fitted_like_the_points() -> None:
    """The band, and where each replicate is inside, are those of as many least-squares fits."""
    rng = np.random.default_rng(4)
    x, y = rng.uniform(0.5, 3, 7), rng.normal(size=7)
    xs, ys = x + 0.1 * rng.normal(size=(50, 7)), y + rng.normal(size=(50, 7))
    ends = np.full(50, -np.inf), np.full(50, 1.0)
    curve = fit_curve(Estimates(x, xs), Estimates(y, ys), Ends((-np.inf, 1.0), ends), 2)
    places = np.linspace(x.min(), x.max(), GRID)
    fits = np.array([Polynomial.fit(a, b, 2)(places) for a, b in zip(xs, ys, strict=True)])
    within = (places >= xs.min(1, keepdims=True)) & (places <= xs.max(1, keepdims=True))
    reached = np.where(within, fits, np.nan)
    assert curve.low == pytest.approx(np.nanquantile(reached, 0.025, axis=0))
    assert curve.high == pytest.approx(np.nanquantile(reached, 0.975, axis=0))
    assert (curve.inside_replicates == ((fits <= 1.0) & within)).mean() > 0.999
