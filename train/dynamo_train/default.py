"""The embedded default: a three-token model of Python, trained on the standard library of this interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from . import pipeline
from .card import write_card
from .corpus import HELD_OUT_PERCENT, STANDARD_LIBRARY
from .loop import Recipe
from .pipeline import BaseShape

N_HEADS = 3
SHAPE = BaseShape(hidden_size=256, layers=6, attention_heads=4, vocab_size=4096, context_length=1024)
BASE_RECIPE = Recipe(
    steps=1800,
    sequences=8,
    length=1024,
    micro_batch=4,
    optimizer="muon",
    base_lr=4e-3,
    heads_lr=4e-3,
    shared_gradient_scale=1.0,
    freeze_base=False,
    weight_decay=0.1,
    warmup=0.01,
    clip=1.0,
    precision="bf16",
    seed=0,
    validate_every=200,
    early_stop=True,
)
HEADS_RECIPE = replace(BASE_RECIPE, steps=600, base_lr=0.0, freeze_base=True, seed=1)
MIN_COUNTS = [1, 1, 1]


def train_default(out: Path, work: Path) -> None:
    """Rebuild the checkpoint that ships with the package; the same call again goes on where it stopped.

    Args:
        out: the new folder.
        work: tokens and checkpoints of the two stages.
    """
    base, heads = work / "base", work / "heads"
    if not base.exists():
        pipeline.train_base(
            base,
            STANDARD_LIBRARY,
            SHAPE,
            BASE_RECIPE,
            held_out_percent=HELD_OUT_PERCENT,
            work=work / "base-work",
        )
    if not heads.exists():
        pipeline.train_heads(
            str(base),
            heads,
            STANDARD_LIBRARY,
            N_HEADS,
            HEADS_RECIPE,
            held_out_percent=HELD_OUT_PERCENT,
            work=work / "heads-work",
        )
    pipeline.add_counts(
        heads, STANDARD_LIBRARY, MIN_COUNTS, held_out_percent=HELD_OUT_PERCENT, work=work / "heads-work"
    )
    pipeline.convert(heads, out, torch.float16)
    write_card(out, STANDARD_LIBRARY, HELD_OUT_PERCENT)
