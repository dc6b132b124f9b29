"""Otsu's threshold and the blur, each against the literal computation on the full grid."""

import math

import numpy as np
import pytest
from support import dense_dynamo as dense

from dynamo_runtime import thresholds


@pytest.mark.parametrize("shape", [(1, 5), (2, 3), (4, 4, 4), (9, 1, 7), (3, 2, 5, 4)])
def test_blur_routes_equal_the_full_grid(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    for share in (0.02, 0.3, 1.0):
        grid = rng.random(shape) * (rng.random(shape) < share)
        grid[(0,) * len(shape)] = 0.7
        cells, values = np.flatnonzero(grid), grid[grid > 0]
        expected = dense.gaussian_blur(grid)
        expected = np.sort(expected[expected > 0])
        for dense_per_sparse in (thresholds.DENSE_PER_SPARSE, 0, math.inf):  # as it is chosen, and each of the routes
            found = thresholds.blurred_values(cells, values, shape, dense_per_sparse=dense_per_sparse)
            assert np.allclose(np.sort(found), expected, rtol=1e-13)
        assert expected.sum() > 0


def test_otsu_equals_trying_every_value() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        values = rng.random(rng.integers(1, 30)) ** rng.integers(1, 6)
        values = np.round(values, rng.integers(1, 4)) + 0.01  # with repetitions
        zeros = int(rng.choice([0, 1, 50, 5000]))
        expected = dense.otsu(np.concatenate([np.zeros(zeros), values]))
        found = thresholds.otsu_threshold(values, zeros)
        # Without a second class the literal version answers with the only value there is.
        assert found == (expected if expected > 0 else values.min())


def test_otsu_splits_two_clusters() -> None:
    assert thresholds.otsu_threshold(np.array([0.1, 0.9, 0.12, 0.8])) == 0.8
    assert thresholds.otsu_threshold(np.array([0.5, 0.5])) == 0.5
    assert thresholds.otsu_threshold(np.array([0.5]), zeros=10) == 0.5
