"""Which precision a device is fast in."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from .spread import processes

FASTER = 1.5
"""So many times as fast must products in bfloat16 be; in between, the rest of a step eats the gain."""
_ROWS, _SIZE, _REPEATS = 1024, 1024, 5


def fastest_precision() -> str:
    """`bf16` if this machine multiplies bfloat16 matrices faster than float32 ones, else `no`.

    Processors without instructions for bfloat16 emulate it, several times slower than float32.
    """
    seconds = {dtype: _seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return "bf16" if seconds[torch.float32] > FASTER * seconds[torch.bfloat16] else "no"


def _seconds(dtype: torch.dtype) -> float:
    """Return the fastest of some products of a decoder layer's size."""
    device = processes().device
    rows, weight = (torch.ones(shape, _SIZE, dtype=dtype, device=device) for shape in (_ROWS, _SIZE))
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        F.linear(rows, weight)[0, 0].item()  # which waits for a device that works on its own
        best = min(best, time.perf_counter() - start)
    return best
