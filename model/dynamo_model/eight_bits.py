"""Drafters on disk at 8 bits: a quarter of the bytes, and after the export to int8 the same numbers.

Every matrix is kept as whole numbers in blocks of 64 along its inputs, with one scale a block, by the very rule of the
kernels that an int8 bundle runs on: the number of largest magnitude, with its sign, becomes -128.  Read back, that
number is exactly -128 scales, so that rounding once more, as the export does, finds the same scale and the same whole
numbers, ties in magnitude aside.  A scale a row, or blocks that are made otherwise, would be rounded twice; so are
matrices that the export multiplies by the norm in front of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CheckpointError

BLOCK = 64
"""Inputs that share a scale, as in an int8 bundle."""

STORAGE, FORM = "storage", "int8, blocks of 64"
"""Key and value in the file's metadata that say so."""

_SCALES = ".scales"
_LOWEST, _HIGHEST = -128, 127


def to_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return matrices as whole numbers and scales; vectors, and what is no floating-point number, as they are.

    Args:
        tensors: By name; matrices [..., outputs, inputs].

    Returns:
        For every matrix int8 [..., outputs, inputs] under its name, and under `<name>.scales` float32
        [..., outputs, ceil(inputs / 64)].
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            stored[name] = tensor
            continue
        blocks = _in_blocks(tensor.detach().float())
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scales = largest / _LOWEST
        whole = (blocks / torch.where(scales == 0, 1, scales)).round().clamp(_LOWEST, _HIGHEST)
        stored[name] = whole.flatten(-2)[..., : tensor.shape[-1]].to(torch.int8)
        stored[name + _SCALES] = scales[..., 0]
    return stored


def from_eight_bits(stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return what `to_eight_bits` made, in float32 again.

    Args:
        stored: Tensors of a file.
        path: The file, for what is said of it.

    Raises:
        CheckpointError: Whole numbers and scales do not belong together.
    """
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith(_SCALES)}
    for name in stored.keys() - tensors.keys():
        whole, scales = tensors.get(name.removesuffix(_SCALES)), stored[name]
        if whole is None or whole.dtype != torch.int8 or not _fit(whole, scales):
            raise CheckpointError(f"{path} is damaged: '{name}' fits no matrix of whole numbers in it")
        spread = scales.float().repeat_interleave(BLOCK, -1)[..., : whole.shape[-1]]
        tensors[name.removesuffix(_SCALES)] = whole.float() * spread
    if bare := [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
        raise CheckpointError(f"{path} is damaged: '{bare[0]}' has no scales")
    return tensors


def check_form(form: str, path: Path) -> None:
    """Refuse a file that is stored in a way unknown here.

    Raises:
        CheckpointError: It is.
    """
    if form != FORM:
        raise CheckpointError(f"{path} is stored as '{form}', which this version cannot read: install a newer one")


def _in_blocks(matrix: Tensor) -> Tensor:
    """Return the last axis in blocks [..., ceil(inputs / 64), 64], the last one filled up with zeros."""
    return F.pad(matrix, (0, -matrix.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _fit(whole: Tensor, scales: Tensor) -> bool:
    return scales.is_floating_point() and scales.shape == (*whole.shape[:-1], -(-whole.shape[-1] // BLOCK))
