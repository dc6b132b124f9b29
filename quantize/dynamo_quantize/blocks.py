"""Weights in blocks: so many low-bit numbers along the inputs of a product share a scale and a zero point."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from dynamo_runtime.providers import import_onnxruntime

SLICE_ELEMENTS = 1 << 22  # weights quantized at once: bounds the quantizers' working copies


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
        bits: 4 or 8.
        block_size: Inputs that share a scale; a power of two, at least 16.
        symmetric: Whether all zero points are the middle of the range, and so not stored.
    """

    bits: int
    block_size: int = 32
    symmetric: bool = True


@dataclass(frozen=True)
class Blocks:
    """A weight [N outputs, K inputs] as MatMulNBits wants it; (q - zero point) · scale is what it stands for.

    Attributes:
        packed: uint8 [N, ceil(K / block), block · bits / 8], the lower half of a byte first.
        scales: float32 [N, ceil(K / block)].
        zero_points: uint8 [N, ceil(ceil(K / block) · bits / 8)], or None where all are 2^(bits - 1).
        format: Bits and block size.
    """

    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    format: Format

    @classmethod
    def pack(cls, q: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, form: Format) -> Blocks:
        """Pack numbers q [N, blocks, block size] with scales and zero points [N, blocks]."""
        return cls(
            _pack(q.astype(np.uint8), form.bits),
            np.ascontiguousarray(scales, np.float32),
            None if form.symmetric else _pack(zero_points.astype(np.uint8), form.bits),
            form,
        )


def _pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Return the last axis in bytes, two 4-bit numbers to one."""
    if bits == 8:
        return np.ascontiguousarray(numbers)
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros((*numbers.shape[:-1], 1), np.uint8)], axis=-1)
    return np.ascontiguousarray(numbers[..., ::2] | numbers[..., 1::2] << 4)


def round_to_nearest(weight: np.ndarray, form: Format, at_once: int = SLICE_ELEMENTS) -> Blocks:
    """Return scales from the largest (symmetric) or from smallest and largest weight of a block; onnxruntime's kernel.

    Args:
        weight: float32 [K, N].
        form: How to store it.
        at_once: Weights quantized at once, by whole outputs.
    """
    config = _nbits().DefaultWeightOnlyQuantConfig(
        bits=form.bits, block_size=form.block_size, is_symmetric=form.symmetric
    )
    quantizer = _nbits().DefaultWeightOnlyQuantizer(config)

    def quantize(part: np.ndarray) -> Blocks:
        packed, scales, zero_points = quantizer.qbits_block_quant(np.ascontiguousarray(part))
        return Blocks(packed, scales, None if form.symmetric else zero_points, form)

    return _in_slices(weight, quantize, at_once)


def _in_slices(weight: np.ndarray, quantize: Callable[[np.ndarray], Blocks], at_once: int) -> Blocks:
    """Quantize some outputs at a time."""
    step = max(1, at_once // weight.shape[0])
    slices = [quantize(weight[:, at : at + step]) for at in range(0, weight.shape[1], step)]
    zero_points = [part.zero_points for part in slices if part.zero_points is not None]
    return Blocks(
        np.concatenate([part.packed for part in slices]),
        np.concatenate([part.scales for part in slices]),
        np.concatenate(zero_points) if zero_points else None,
        slices[0].format,
    )


@cache
def _nbits() -> ModuleType:
    """Import onnxruntime's module of block quantizers, and keep it from configuring everybody's logging."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    import_onnxruntime()
    import onnxruntime.quantization.matmul_nbits_quantizer as module

    root.setLevel(level)
    root.handlers[:] = handlers
    found: Any = module
    return found
