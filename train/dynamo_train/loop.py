"""The training loop: the same on one CPU, one GPU or many, and bit-equal after an interrupt on a CPU."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from tqdm import tqdm

from dynamo_runtime.files import WholeFolder, write_whole

from . import state
from .errors import TrainingError
from .objective import Objective
from .optimizers import cosine_schedule, make_optimizers
from .recipe import Recipe
from .tokens import TokenStreams

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


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
        folder: checkpoints and ``metrics.jsonl``; a checkpoint of a run that differs in anything that decides its
            result is refused.
        checkpoint_every: steps between checkpoints; an interrupt (Ctrl-C) writes one as well.

    Returns:
        The steps that were run and the held-out perplexities at the end.

    Raises:
        TrainingError: ``folder`` holds another run's checkpoint or a damaged one, or the loss is no longer finite.
        OutputError: another process trains in ``folder``, or it cannot be written.
    """
    set_seed(recipe.seed)
    accelerator = Accelerator(mixed_precision=recipe.precision)
    if recipe.sequences % (recipe.micro_batch * accelerator.num_processes):
        raise TrainingError(
            f"{recipe.sequences} sequences a batch do not divide into micro-batches of {recipe.micro_batch} "
            f"on {accelerator.num_processes} process(es)"
        )
    with _Run(accelerator, objective, streams, recipe, folder) as run:
        bar = tqdm(
            total=recipe.steps,
            initial=run.step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        try:
            while run.step < recipe.steps and not (recipe.early_stop and _stalled(run.validations)):
                losses = run.backward()
                with _undisturbed():
                    run.update(losses, bar)
                if run.step % checkpoint_every == 0 and run.step < recipe.steps:
                    run.save()
        except KeyboardInterrupt:
            run.save()
            raise
        finally:
            bar.close()
        run.save()
        return Outcome(run.step, _validate(objective, streams, recipe))


class _Run:
    """A run between two steps: all that its next step depends on.

    Attributes:
        step: steps done.
        validations: what early stopping goes by, so far.
    """

    def __init__(
        self, accelerator: Accelerator, objective: Objective, streams: TokenStreams, recipe: Recipe, folder: Path
    ) -> None:
        self.step, self.validations = 0, list[float]()
        self._accelerator, self._streams, self._recipe, self._folder = accelerator, streams, recipe, folder
        self._objective = objective
        self._fingerprint = state.fingerprint(objective, streams, recipe, accelerator.num_processes)
        optimizers = make_optimizers(
            objective,
            kind=recipe.optimizer,
            base_lr=recipe.base_lr,
            heads_lr=recipe.heads_lr,
            weight_decay=recipe.weight_decay,
        )
        self._prepared, *self._optimizers = accelerator.prepare(objective.train(), *optimizers)
        self._plain = [optimizer.optimizer for optimizer in self._optimizers]
        self._schedules = [cosine_schedule(optimizer, recipe.steps, recipe.warmup) for optimizer in self._plain]
        self._place = WholeFolder(folder / "checkpoint")
        self._held = ExitStack()

    def __enter__(self) -> _Run:
        """Go on from the last checkpoint, if there is one, and keep other runs out of the folder.

        Raises:
            TrainingError: the checkpoint is damaged, or another run's.
            OutputError: another process trains in there.
        """
        with ExitStack() as held:
            if self._accelerator.is_main_process:
                held.enter_context(self._place)
            self._accelerator.wait_for_everyone()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._resume()
            self._random = state.random_state()
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Let go of the folder."""
        self._held.__exit__(*error)

    def _resume(self) -> None:
        progress = state.read_progress(self._place.folder)
        if progress is not None:
            found = state.differences(progress["fingerprint"], self._fingerprint)
            if found:
                more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
                raise TrainingError(
                    f"{self._folder} holds another run: {'; '.join(found[:3])}{more}: "
                    "remove it, name another --work, or go back to what it was"
                )
            rank = self._accelerator.process_index
            state.restore(self._place.folder, self._objective, self._plain, self._schedules, rank)
            self.step, self.validations = progress["step"], progress["validations"]
            logger.info("resuming at step %d", self.step)
        if self._accelerator.is_main_process:
            _cut(self._folder / METRICS, self.step)

    def backward(self) -> torch.Tensor:
        """The gradients of the next step; returns the mean of every loss."""
        return _backward(self._accelerator, self._prepared, self._streams, self._recipe, self.step)

    def update(self, losses: torch.Tensor, bar: tqdm) -> None:
        """Apply the gradients, and note down how the step went.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        if not torch.isfinite(losses).all():
            raise TrainingError(f"the loss is no longer finite at step {self.step}: lower the learning rate")
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.step += 1
        bar.update()
        bar.set_postfix_str(" ".join(f"{loss:.3f}" for loss in losses.tolist()))
        metrics: dict[str, Any] = {"step": self.step, "loss": losses.tolist()}
        every = self._recipe.validate_every
        if every and self.step % every == 0 and self.step < self._recipe.steps:
            figures = _validate(self._objective, self._streams, self._recipe)
            self.validations.append(list(figures.values())[-1])
            bar.write(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
            metrics |= figures
        if self._accelerator.is_main_process:
            with (self._folder / METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        self._random = state.random_state()

    def save(self) -> None:
        """Put a checkpoint in the place of the last one."""
        random = gather_object([self._random])
        if self._accelerator.is_main_process:
            progress = {"fingerprint": self._fingerprint, "step": self.step, "validations": self.validations}
            new = self._place.new()
            state.save(new, self._objective, self._plain, self._schedules, random, progress)
            self._place.put(new)
        self._accelerator.wait_for_everyone()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the end: half an optimizer step is nothing to go on from."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _cut(metrics: Path, step: int) -> None:
    """Drop the lines of steps that were done after the last checkpoint, and will be done again."""
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
        write_whole(metrics, "".join(kept))


def _backward(
    accelerator: Accelerator, objective: torch.nn.Module, streams: TokenStreams, recipe: Recipe, step: int
) -> torch.Tensor:
    """The gradients of this process' share of a batch; returns the mean of every loss."""
    plain: Objective = accelerator.unwrap_model(objective)
    inputs = plain.batch(streams, step, recipe)
    share = np.split(inputs, accelerator.num_processes)[accelerator.process_index]
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
    return accelerator.reduce(total, "mean")


def _validate(objective: Objective, streams: TokenStreams, recipe: Recipe) -> dict[str, float]:
    return objective.validate(objective.held_out(streams, recipe))


def _stalled(validations: list[float]) -> bool:
    return len(validations) > 1 and validations[-1] >= validations[-2]
