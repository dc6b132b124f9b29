"""Learning rates, parameter groups and schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .objective import Objective

# DynaMo, training section: AdamW with beta 0.9/0.95, epsilon 1e-8.
_ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}

# DynaMo, table of learning rates: parameters of the T3 model -> LR_B, LR_M; LR_MB is a tenth of LR_B.
PAPER_LEARNING_RATES = {
    77e6: (1e-5, 1e-3),
    180e6: (6e-6, 6e-4),
    430e6: (3e-6, 3e-4),
    1.1e9: (2e-6, 2e-4),
    2.9e9: (1.6e-6, 1.6e-4),
    7.3e9: (1.2e-6, 1.2e-4),
}


def paper_learning_rates(parameters: int) -> tuple[float, float]:
    """LR_B and LR_M of the paper's model that is nearest in size (on a logarithmic scale)."""
    nearest = min(PAPER_LEARNING_RATES, key=lambda size: abs(math.log(size / parameters)))
    return PAPER_LEARNING_RATES[nearest]


def make_optimizers(
    objective: Objective, *, kind: str, base_lr: float, heads_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return one optimizer for all parameters, or two: Muon for the layers' matrices and AdamW for the rest.

    Args:
        objective: What is trained; parameters without gradient are left out.
        kind: `adamw` (the paper) or `muon`, which needs fewer steps from a random start.
        base_lr: The paper's LR_B, for stem, first head, final norm and embeddings.
        heads_lr: The paper's LR_M, for what the base did not bring along: further heads, joint head, look-ahead
            embeddings.
        weight_decay: Decoupled, on matrices alone.
    """
    new, embeddings = objective.new_parameters(), objective.embeddings()
    muon, adamw = [], []
    for parameter in objective.model.parameters():
        if not parameter.requires_grad:
            continue
        lr = heads_lr if parameter in new else base_lr
        group = {"params": [parameter], "lr": lr}
        if kind == "muon" and parameter.ndim == 2 and parameter not in embeddings:
            muon.append(group | {"weight_decay": weight_decay})
        else:
            decays = parameter.ndim >= 2 and parameter not in embeddings
            adamw.append(group | {"weight_decay": weight_decay if decays else 0.0})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(_merge(adamw), **_ADAMW)]
    if muon:  # its update has AdamW's root mean square, so that both take the same learning rate
        optimizers.append(torch.optim.Muon(_merge(muon), adjust_lr_fn="match_rms_adamw"))
    return optimizers


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> LambdaLR:
    """Schedule a linear warm-up over the first share `warmup` of the steps, then a cosine to 0."""
    warmup_steps = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))

    return LambdaLR(optimizer, factor)


def _merge(groups: list[dict]) -> list[dict]:
    """Join groups that differ in nothing but their parameters."""
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in groups:
        merged.setdefault((group["lr"], group["weight_decay"]), []).extend(group["params"])
    return [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in merged.items()]
