"""What decides the result of a training run, apart from the model and the text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a training run, apart from the model and the text.

    Attributes:
        steps: Optimizer steps.
        sequences: Sequences in a batch, over all processes.
        length: Positions in a sequence.
        micro_batch: Sequences a process puts through the model at once; the rest is accumulated.
        optimizer: `adamw` or `muon`.
        base_lr: LR_B, stem and first head.
        heads_lr: LR_M, what the base did not bring along: further heads, joint head, look-ahead embeddings.
        shared_gradient_scale: LR_MB / LR_B, gradients from the further heads into shared weights.
        freeze_base: Train what is new alone.
        weight_decay: On matrices.
        warmup: Share of the steps with rising learning rate.
        clip: Largest gradient norm.
        precision: `no` or `bf16` (autocast).
        seed: Of the batches' order.
        validate_every: Steps between validations; 0 validates at the end alone.
        validation_tokens: Held-out tokens that a validation reads at most; 0 for all.
        early_stop: End at the first validation that is no better than the one before.
    """

    steps: int
    sequences: int
    length: int
    micro_batch: int
    optimizer: str
    base_lr: float
    heads_lr: float
    shared_gradient_scale: float
    freeze_base: bool
    weight_decay: float
    warmup: float
    clip: float
    precision: str
    seed: int
    validate_every: int = 0
    validation_tokens: int = 0
    early_stop: bool = False
