"""The training loop: the same on one CPU, one GPU or many, and bit-equal after an interrupt on a CPU."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from .errors import TrainingError
from .objective import Objective
from .optimizers import cosine_schedule, make_optimizers
from .tokens import TokenStreams, batch, validation_batches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a training run, apart from the model and the text.

    Attributes:
        steps: optimizer steps.
        sequences: sequences in a batch, over all processes.
        length: positions in a sequence.
        micro_batch: sequences a process puts through the model at once; the rest is accumulated.
        optimizer: ``adamw`` or ``muon``.
        base_lr: LR_B, stem and first head.
        heads_lr: LR_M, what the base did not bring along: further heads, joint head, look-ahead embeddings.
        shared_gradient_scale: LR_MB / LR_B, gradients from the further heads into shared weights.
        freeze_base: train what is new alone.
        weight_decay: on matrices.
        warmup: share of the steps with rising learning rate.
        clip: largest gradient norm.
        precision: ``no`` or ``bf16`` (autocast).
        seed: of the batches' order.
        validate_every: steps between validations; 0 validates at the end alone.
        early_stop: end at the first validation that is no better than the one before.
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
    early_stop: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps run, which an early stop makes fewer, and the held-out perplexities."""

    steps: int
    figures: dict[str, float]


def train(
    objective: Objective,
    streams: TokenStreams,
    recipe: Recipe,
    folder: Path,
    *,
    checkpoint_every: int = 200,
) -> Outcome:
    """Train to the end of the recipe, from the last checkpoint in ``folder`` if there is one.

    Args:
        objective: holds the model, which is trained in place.
        streams: training and held-out tokens.
        recipe: what to do.
        folder: checkpoints and ``metrics.jsonl``; a checkpoint of another recipe or other settings is refused.
        checkpoint_every: steps between checkpoints; an interrupt (Ctrl-C) writes one as well.

    Returns:
        The steps that were run and the held-out perplexities at the end.

    Raises:
        TrainingError: ``folder`` holds another run's checkpoint, or the loss is no longer finite.
    """
    set_seed(recipe.seed)
    accelerator = Accelerator(mixed_precision=recipe.precision)
    if recipe.sequences % (recipe.micro_batch * accelerator.num_processes):
        raise TrainingError(
            f"{recipe.sequences} sequences a batch do not divide into micro-batches of {recipe.micro_batch} "
            f"on {accelerator.num_processes} process(es)"
        )
    optimizers = make_optimizers(
        objective,
        kind=recipe.optimizer,
        base_lr=recipe.base_lr,
        heads_lr=recipe.heads_lr,
        weight_decay=recipe.weight_decay,
    )
    prepared, *optimizers = accelerator.prepare(objective.train(), *optimizers)
    schedules = [cosine_schedule(optimizer.optimizer, recipe.steps, recipe.warmup) for optimizer in optimizers]
    accelerator.register_for_checkpointing(*schedules)

    settings = {"settings": objective.settings} if objective.settings else {}
    identity = json.loads(json.dumps({"recipe": asdict(recipe), "corpus": streams.record.sha256} | settings))
    step, validations = _resume(accelerator, folder, identity)
    bar = tqdm(
        total=recipe.steps,
        initial=step,
        desc="training",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    try:
        while step < recipe.steps and not (recipe.early_stop and _stalled(validations)):
            losses = _train_step(accelerator, prepared, optimizers, schedules, streams, recipe, step)
            if not torch.isfinite(losses).all():
                raise TrainingError(f"the loss is no longer finite at step {step}: lower the learning rate")
            step += 1
            bar.update()
            bar.set_postfix_str(" ".join(f"{loss:.3f}" for loss in losses.tolist()))
            metrics: dict[str, Any] = {"step": step, "loss": losses.tolist()}
            if recipe.validate_every and step % recipe.validate_every == 0 and step < recipe.steps:
                figures = _validate(objective, streams, recipe)
                validations.append(list(figures.values())[-1])
                bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
                metrics |= figures
            if accelerator.is_main_process:
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(metrics) + "\n")
            if step % checkpoint_every == 0 and step < recipe.steps:
                _save(accelerator, folder, identity, step, validations)
    except KeyboardInterrupt:
        _save(accelerator, folder, identity, step, validations)
        raise
    finally:
        bar.close()
    _save(accelerator, folder, identity, step, validations)
    return Outcome(step, _validate(objective, streams, recipe))


def _train_step(
    accelerator: Accelerator,
    objective: torch.nn.Module,
    optimizers: list[Any],
    schedules: list[Any],
    streams: TokenStreams,
    recipe: Recipe,
    step: int,
) -> torch.Tensor:
    """One optimizer step over this process' share of the batch; returns the mean of every loss."""
    plain: Objective = accelerator.unwrap_model(objective)
    tokens = batch(
        streams.train,
        step,
        sequences=recipe.sequences,
        length=recipe.length,
        extra=plain.extra,
        seed=recipe.seed,
    )
    share = np.split(tokens, accelerator.num_processes)[accelerator.process_index]
    micro_batches = np.split(share, len(share) // recipe.micro_batch)
    total = torch.zeros(plain.n_losses, device=accelerator.device)
    for i, micro in enumerate(micro_batches):
        last = i + 1 == len(micro_batches)
        with accelerator.no_sync(objective) if not last else accelerator.autocast():
            losses = objective(torch.from_numpy(micro).to(accelerator.device))
            accelerator.backward(losses.sum() / len(micro_batches))
        total += losses.detach() / len(micro_batches)
    if recipe.clip:
        accelerator.clip_grad_norm_([p for p in objective.parameters() if p.requires_grad], recipe.clip)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return accelerator.reduce(total, "mean")


def _validate(objective: Objective, streams: TokenStreams, recipe: Recipe) -> dict[str, float]:
    return objective.validate(
        validation_batches(streams.held_out, sequences=recipe.micro_batch, length=recipe.length, extra=objective.extra)
    )


def _stalled(validations: list[float]) -> bool:
    return len(validations) > 1 and validations[-1] >= validations[-2]


def _save(
    accelerator: Accelerator, folder: Path, identity: dict[str, Any], step: int, validations: list[float]
) -> None:
    """Write a checkpoint beside the last one, then put it in its place."""
    new, current = folder / "checkpoint.new", folder / "checkpoint"
    accelerator.save_state(str(new), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (new / "progress.json").write_text(json.dumps(identity | {"step": step, "validations": validations}))
        shutil.rmtree(current, ignore_errors=True)
        new.rename(current)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, folder: Path, identity: dict[str, Any]) -> tuple[int, list[float]]:
    folder.mkdir(parents=True, exist_ok=True)
    progress_path = folder / "checkpoint" / "progress.json"
    if not progress_path.is_file():
        return 0, []
    progress = json.loads(progress_path.read_text())
    step, validations = progress.pop("step"), progress.pop("validations")
    if progress != identity:
        raise TrainingError(f"{folder} holds a run with another recipe or corpus: remove it or name another folder")
    accelerator.load_state(str(progress_path.parent))
    logger.info("resuming at step %d", step)
    return step, validations
