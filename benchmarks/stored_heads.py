"""Drafters stored at 8 bits, then exported to int8: what the second rounding costs, on random weights.

    python benchmarks/stored_heads.py

Relative root-mean-square error of a matrix as stored, and behind the export's rounding in blocks of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynamo_model.eight_bits import BLOCK, from_eight_bits, to_eight_bits
from dynamo_quantize.blocks import Format, round_to_nearest

OUTPUTS, INPUTS = 1536, 576


def exported(weight: Tensor) -> Tensor:
    """Return what an int8 bundle has of a weight [outputs, inputs]; inputs fill whole blocks."""
    blocks = round_to_nearest(np.ascontiguousarray(weight.numpy().T), Format(8, BLOCK))
    whole = blocks.packed.reshape(OUTPUTS, -1, BLOCK).astype(np.float32) - 128
    return torch.from_numpy(whole * blocks.scales.reshape(OUTPUTS, -1, 1)).reshape(weight.shape)


def by_largest(weight: Tensor, size: int) -> Tensor:
    """Round in blocks of some size, the largest magnitude at 127."""
    blocks = weight.unflatten(-1, (-1, size))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scales).round() * scales).flatten(-2)


STORED: dict[str, Callable[[Tensor], Tensor]] = {
    "fp32": lambda weight: weight,
    "int8, blocks of 64, −128": lambda weight: from_eight_bits(to_eight_bits({"w": weight}), Path())["w"],
    "int8, blocks of 64, ±127": lambda weight: by_largest(weight, BLOCK),
    "int8, a scale a row": lambda weight: by_largest(weight, INPUTS),
}


def main() -> None:
    """Print the table."""
    generator = torch.Generator().manual_seed(0)
    normal = 0.02 * torch.randn(OUTPUTS, INPUTS, generator=generator)
    tails = normal / torch.randn(3, OUTPUTS, INPUTS, generator=generator).square().mean(0).sqrt()  # Student's t, 3
    print("| stored as | normal weights: stored | exported | heavy tails (Student's t, 3): stored | exported |")
    print("|---|---|---|---|---|")
    for name, store in STORED.items():
        cells = [name]
        for weight in (normal, tails):
            stored = store(weight)
            errors = [(each - weight).square().mean().sqrt() for each in (stored, exported(stored))]
            cells += [f"{float(error / weight.square().mean().sqrt()):.4f}" for error in errors]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
