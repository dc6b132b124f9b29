"""GPTQ: every input's rounding error is made up for by the inputs that are not rounded yet.

Frantar, Ashkboos, Hoefler, Alistarh 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, Eq. 2 and 3 and Algorithm 1. (onnxruntime has a version of it that returns the rounded
weights without the scales they were rounded with, so that they would have to be rounded a second time.)
"""

from __future__ import annotations

import numpy as np

from .blocks import Blocks, Format

DAMPING = 0.01  # of the mean diagonal, added to the diagonal (section 4.2)
CLIPS = np.linspace(1.0, 0.7, 13)  # shares of a block's range that are tried for its scale
OUTPUTS_AT_ONCE = 2048


def gptq(weight: np.ndarray, hessian: np.ndarray, form: Format, outputs_at_once: int = OUTPUTS_AT_ONCE) -> Blocks:
    """Quantize a weight for the inputs that it meets.

    Args:
        weight: float32 [K, N].
        hessian: Σ x xᵀ of those inputs, [K, K].
        form: How to store it.
        outputs_at_once: Bounds the working copies.
    """
    inverse = _inverse_factor(hessian)
    importance = np.diag(hessian) / max(float(np.diag(hessian).mean()), 1e-30) + DAMPING
    pieces = [
        _round(weight[:, at : at + outputs_at_once].astype(np.float64), inverse, importance, form)
        for at in range(0, weight.shape[1], outputs_at_once)
    ]
    q, scales, zeros = (np.concatenate(each) for each in zip(*pieces, strict=True))
    return Blocks.pack(q, scales, zeros, form)


def _inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Return the upper Cholesky factor of the damped Hessian's inverse."""
    damped = hessian.astype(np.float64)
    diagonal = np.diag_indices_from(damped)
    damped[diagonal] += DAMPING * max(float(damped[diagonal].mean()), 1e-30)
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def _round(
    weight: np.ndarray, inverse: np.ndarray, importance: np.ndarray, form: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round weight [K, N], which it changes, to q [N, blocks, block], scales and zero points [N, blocks]."""
    largest = 2**form.bits - 1
    blocks, n = -(-len(weight) // form.block_size), weight.shape[1]
    q = np.zeros((n, blocks, form.block_size), np.uint8)
    scales, zeros = np.zeros((n, blocks), np.float32), np.zeros((n, blocks), np.float32)
    for block, start in enumerate(range(0, len(weight), form.block_size)):
        rows = slice(start, min(start + form.block_size, len(weight)))
        errors = np.zeros((rows.stop - rows.start, weight.shape[1]))
        scale, zero = _scales(weight[rows], importance[rows], form)
        scales[:, block], zeros[:, block] = scale, zero
        for i, row in enumerate(range(rows.start, rows.stop)):
            rounded = np.clip(np.round(weight[row] / scale) + zero, 0, largest)
            q[:, block, i] = rounded
            errors[i] = (weight[row] - (rounded - zero) * scale) / inverse[row, row]
            rest = slice(row + 1, rows.stop)
            weight[rest] -= np.outer(inverse[row, rest], errors[i])
        weight[rows.stop :] -= inverse[rows, rows.stop :].T @ errors
    return q, scales, zeros


def _scales(block: np.ndarray, importance: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point [N] of a block [inputs, N]: the clipped range with the least weighted error."""
    largest, middle = 2**form.bits - 1, 2 ** (form.bits - 1)
    low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
    if form.symmetric:  # the side that reaches further gets the range's further end, -2^(bits - 1)
        extreme = np.where(high > -low, high, low)
        whole = -extreme / middle
    else:
        whole = (high - low) / largest
    whole = np.where(whole == 0, 1.0, whole)
    best = np.full(block.shape[1], np.inf)
    scale, zero = whole.copy(), np.full(block.shape[1], float(middle))
    for clip in CLIPS:
        tried = (whole * clip).astype(np.float32).astype(np.float64)  # as it will be stored
        at = np.full_like(tried, middle) if form.symmetric else np.clip(np.round(-low * clip / tried), 0, largest)
        rounded = np.clip(np.round(block / tried) + at, 0, largest)
        error = (importance[:, None] * ((rounded - at) * tried - block) ** 2).sum(0)
        better = error < best
        best, scale, zero = np.where(better, error, best), np.where(better, tried, scale), np.where(better, at, zero)
    return scale, zero
