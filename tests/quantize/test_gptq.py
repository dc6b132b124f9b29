"""GPTQ against optimal brain quantization done one input at a time, with every inverse computed afresh."""

from __future__ import annotations

import numpy as np
import pytest
from support.naive import dequantize, relative, unpack

from dynamo_quantize.blocks import Blocks, Format, round_to_nearest
from dynamo_quantize.gptq import gptq

K, N = 56, 9
FORMATS = [Format(4, 16), Format(4, 32, False), Format(4, 32), Format(8, 16, False)]


def correlated(rows: int, k: int, seed: int = 0) -> np.ndarray:
    """Inputs of which some say nearly the same, and some are much larger than others."""
    rng = np.random.default_rng(seed)
    few = rng.normal(size=(rows, k // 4)) @ rng.normal(size=(k // 4, k))
    return ((few + 0.3 * rng.normal(size=(rows, k))) * np.exp(rng.normal(size=k))).astype(np.float32)


def meant(blocks: Blocks, k: int) -> np.ndarray:
    """The weight [K, N] that blocks stand for."""
    form = blocks.format
    return dequantize(blocks.packed, blocks.scales, blocks.zero_points, form.bits, form.block_size, k).T


def scale_of(values: np.ndarray, importance: np.ndarray, form: Format) -> tuple[float, int]:
    """Scale and zero point of one block of one output: the best of 13 shares of the range."""
    largest, middle = 2**form.bits - 1, 2 ** (form.bits - 1)
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    found: list[tuple[float, float, int]] = []
    for share in np.linspace(1.0, 0.7, 13):
        if form.symmetric:
            scale, zero = float(np.float32(share * (-high if high > -low else -low) / middle)), middle
        else:
            scale = float(np.float32(share * (high - low) / largest))
            zero = int(np.clip(np.round(-low * share / scale), 0, largest))
        q = np.clip(np.round(values / scale) + zero, 0, largest)
        found.append((float((importance * ((q - zero) * scale - values) ** 2).sum()), scale, zero))
    best = min(range(len(found)), key=lambda i: found[i][0])
    return found[best][1], found[best][2]


def naive_gptq(weight: np.ndarray, hessian: np.ndarray, form: Format) -> np.ndarray:
    """The dequantized weight [K, N]; one output at a time, one input at a time."""
    k, n = weight.shape
    largest = 2**form.bits - 1
    damped = hessian.astype(np.float64) + 0.01 * np.mean(np.diag(hessian)) * np.eye(k)
    importance = np.diag(hessian) / np.mean(np.diag(hessian)) + 0.01
    out = np.zeros((k, n))
    for column in range(n):
        w = weight[:, column].astype(np.float64)
        scale, zero = 1.0, 0
        for i in range(k):
            if i % form.block_size == 0:
                block = slice(i, i + form.block_size)
                scale, zero = scale_of(w[block], importance[block], form)
            out[i, column] = (np.clip(np.round(w[i] / scale) + zero, 0, largest) - zero) * scale
            inverse = np.linalg.inv(damped[i:, i:])  # of the inputs that are not rounded yet
            w[i:] -= inverse[:, 0] * (w[i] - out[i, column]) / inverse[0, 0]
    return out


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("at_once", [4096, 4])
def test_agrees_with_the_naive_method(form: Format, at_once: int) -> None:
    """Blocks, the Cholesky factor and groups of outputs change nothing but the time it takes."""
    x = correlated(200, K)
    weight = np.random.default_rng(1).normal(size=(K, N)).astype(np.float32)
    found = meant(gptq(weight, x.T @ x, form, outputs_at_once=at_once), K)
    expected = naive_gptq(weight, x.T @ x, form)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_lose_less_than_by_rounding(form: Format) -> None:
    """On correlated inputs, also such as were not seen, the outputs are closer although the weight is further."""
    seen, unseen = np.split(correlated(800, K), 2)
    weight = np.random.default_rng(1).normal(size=(K, N)).astype(np.float32)
    ours, rounded = meant(gptq(weight, seen.T @ seen, form), K), meant(round_to_nearest(weight, form), K)
    assert relative(ours, weight) > relative(rounded, weight)
    assert relative(seen @ ours, seen @ weight) < 0.7 * relative(seen @ rounded, seen @ weight)
    assert relative(unseen @ ours, unseen @ weight) < 0.8 * relative(unseen @ rounded, unseen @ weight)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_independent_inputs_are_not_compensated(form: Format) -> None:
    """With the identity as Hessian every weight is rounded by itself, with a scale at least as good as the range's."""
    weight = np.random.default_rng(1).normal(size=(K, N)).astype(np.float32)
    blocks = gptq(weight, np.eye(K, dtype=np.float32), form)
    k_blocks = -(-K // form.block_size)
    zeros = np.full((N, k_blocks), 2 ** (form.bits - 1))
    if blocks.zero_points is not None:
        zeros = unpack(blocks.zero_points.reshape(N, -1), form.bits, k_blocks)
    scale, zero = (np.repeat(a, form.block_size, axis=1)[:, :K] for a in (blocks.scales, zeros))
    expected = (np.clip(np.round(weight.T / scale) + zero, 0, 2**form.bits - 1) - zero) * scale
    np.testing.assert_allclose(meant(blocks, K).T, expected, atol=1e-6)
    assert relative(meant(blocks, K), weight) <= relative(meant(round_to_nearest(weight, form), K), weight) + 1e-6


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_inputs_that_never_occur(form: Format) -> None:
    """Zeros in the Hessian, or nothing else, give finite numbers close to the weight."""
    x = correlated(200, K)
    x[:, 3] = x[:, 20:24] = 0
    weight = np.random.default_rng(1).normal(size=(K, N)).astype(np.float32)
    weight[:16, 2] = 0
    for hessian in (x.T @ x, np.zeros((K, K), np.float32)):
        found = meant(gptq(weight, hessian, form), K)
        assert np.isfinite(found).all() and relative(found, weight) < 0.5
