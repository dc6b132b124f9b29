"""RMS norm as one node.

Transformers writes RMS norm as six small operations, and onnxruntime does not put them together again. While tracing,
every module that computes exactly that is made to emit onnxruntime's own `SimplifiedLayerNormalization`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """X / sqrt(mean(x²) + ε) · weight over the last axis: what the op computes."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def _is_rms_norm(module: nn.Module) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
        return False
    x = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        return torch.allclose(module(x), rms_norm(x, weight, epsilon), rtol=1e-5, atol=1e-6)


def _emit(module: nn.Module, x: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        "SimplifiedLayerNormalization",
        (x, module.weight),  # type: ignore[arg-type]
        {"axis": -1, "epsilon": module.variance_epsilon, "stash_type": 1},  # type: ignore[dict-item]
        dtype=x.dtype,
        shape=x.shape,
    )


@contextmanager
def rms_norms_fused(model: nn.Module) -> Iterator[None]:
    """Make every RMS norm of the model emit one node for the duration."""
    norms = [module for module in model.modules() if _is_rms_norm(module)]
    try:
        for module in norms:
            module.forward = partial(_emit, module)
        yield
    finally:
        for module in norms:
            del module.forward
