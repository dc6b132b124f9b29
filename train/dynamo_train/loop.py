"""The training loop: the same on one CPU, one GPU or many, and bit-equal after an interrupt on a CPU."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from tqdm import tqdm

from dynamo_runtime.files import WholeFolder, write_whole

from . import state
from .errors import TrainingError
from .objective import Objective
from .optimizers import cosine_schedule, make_optimizers
from .recipe import Recipe
from .spread import PLAIN, Memory, of_all, processes, spread, unshard
from .tokens import TokenStreams

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class TrainingOutcome:
    """How a run ended: steps run, which an early stop makes fewer, and the held-out perplexities."""

    steps: int
    figures: dict[str, float]


def train(
    objective: Objective,
    streams: TokenStreams,
    recipe: Recipe,
    folder: Path,
    *,
    memory: Memory = PLAIN,
    checkpoint_every: int = 200,
    checkpoint_seconds: float = 60.0,
) -> TrainingOutcome:
    """Train to the end of the recipe, from the last checkpoint in `folder` if there is one.

    All processes call it; the main one writes, and has the whole of a sharded model in the end.

    Args:
        objective: Holds the model, which is trained in place.
        streams: Training and held-out tokens.
        recipe: What to do.
        folder: Checkpoints and `metrics.jsonl`; a checkpoint of a run that differs in anything that decides its
            result is refused.
        memory: How the model is kept.
        checkpoint_every: Steps between checkpoints; an interrupt (Ctrl-C) writes one as well.
        checkpoint_seconds: Least time between them, as of a small model one takes longer than a step.

    Returns:
        The steps that were run and the held-out perplexities at the end.

    Raises:
        TrainingError: `folder` holds another run's checkpoint or a damaged one, or the loss is no longer finite.
        OutputError: Another process trains in `folder`, or it cannot be written.
    """
    processes()  # before accelerate looks for them itself
    copies = DistributedDataParallelKwargs(broadcast_buffers=False)  # which training does not change
    accelerator = Accelerator(mixed_precision=recipe.precision, kwargs_handlers=[copies])
    set_seed(recipe.seed, device_specific=True)
    if recipe.sequences % (recipe.micro_batch * accelerator.num_processes):
        raise TrainingError(
            f"{recipe.sequences} sequences a batch do not divide into micro-batches of {recipe.micro_batch} "
            f"on {accelerator.num_processes} process(es)"
        )
    with _Run(accelerator, objective, streams, recipe, folder, memory) as run, _Interrupts(accelerator) as interrupts:
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
                with interrupts.held():
                    run.update(losses, bar)
                if run.step % checkpoint_every == 0 and run.step < recipe.steps and run.due(checkpoint_seconds):
                    run.save()
        except KeyboardInterrupt:
            run.save()
            raise
        finally:
            bar.close()
        run.save()
        outcome = TrainingOutcome(run.step, _validate(objective, streams, recipe))
        if memory.shard:
            unshard(objective)
        return outcome


class _Run:
    """A run between two steps: all that its next step depends on.

    Attributes:
        step: Steps done.
        validations: What early stopping goes by, so far.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        streams: TokenStreams,
        recipe: Recipe,
        folder: Path,
        memory: Memory,
    ) -> None:
        self.step, self.validations = 0, list[float]()
        self._accelerator, self._streams, self._recipe, self._folder = accelerator, streams, recipe, folder
        self._objective = objective
        self._fingerprint = state.fingerprint(objective, streams, recipe)
        self._prepared = spread(objective.train(), accelerator, memory)
        optimizers = make_optimizers(
            objective,
            kind=recipe.optimizer,
            base_lr=recipe.base_lr,
            heads_lr=recipe.heads_lr,
            weight_decay=recipe.weight_decay,
        )
        self._optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
        self._plain = [optimizer.optimizer for optimizer in self._optimizers]
        self._schedules = [cosine_schedule(optimizer, recipe.steps, recipe.warmup) for optimizer in self._plain]
        self._place = WholeFolder(folder / "checkpoint")
        self._saved = time.monotonic()
        self._held = ExitStack()

    def __enter__(self) -> _Run:
        """Go on from the last checkpoint, if there is one, and keep other runs out of the folder.

        Raises:
            TrainingError: The checkpoint is damaged, or another run's.
            OutputError: Another process trains in there.
        """
        with ExitStack() as held:
            if self._accelerator.is_main_process:
                held.enter_context(self._place)
            self._accelerator.wait_for_everyone()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._resume()
            self._note_place()
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
            state.restore(self._place.folder, self._objective, self._plain, self._schedules, self._recipe.seed)
            if self._streams.text is not None:
                positions = dict(enumerate(progress.get("text", [])))
                self._streams.text.go_on(positions.get(self._accelerator.process_index, ""))
            self.step, self.validations = progress["step"], progress["validations"]
            logger.info("resuming at step %d", self.step)
        if self._accelerator.is_main_process:
            _cut(self._folder / METRICS, self.step)

    def backward(self) -> torch.Tensor:
        """Return the gradients of the next step; returns the mean of every loss."""
        return _backward(self._accelerator, self._prepared, self._streams, self._recipe, self.step)

    def update(self, losses: torch.Tensor, bar: tqdm) -> None:
        """Apply the gradients, and note down how the step went.

        Raises:
            TrainingError: The loss is no longer finite.
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
            if self._accelerator.is_main_process:
                bar.write(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
            metrics |= figures
        if self._accelerator.is_main_process:
            with (self._folder / METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        self._note_place()

    def _note_place(self) -> None:
        """Keep what a step that is broken off must not have used up: random numbers and text."""
        self._random = state.random_state()
        self._position = self._streams.text.position() if self._streams.text is not None else None

    def due(self, seconds: float) -> bool:
        """Tell whether the last checkpoint is so long ago, by the clock of the main process."""
        here = self._accelerator.is_main_process and time.monotonic() - self._saved >= seconds
        return bool(self._accelerator.reduce(torch.tensor(float(here), device=self._accelerator.device), "sum"))

    def save(self) -> None:
        """Put a checkpoint in the place of the last one."""
        progress = {"fingerprint": self._fingerprint, "step": self.step, "validations": self.validations}
        if self._position is not None:
            progress["text"] = of_all(self._position)
        new = self._place.new() if self._accelerator.is_main_process else None
        state.save(new, self._objective, self._plain, self._schedules, self._random, progress)
        if new is not None:
            self._place.put(new)
        self._accelerator.wait_for_everyone()
        self._saved = time.monotonic()


class _Interrupts:
    """Ctrl-C, which waits where half a step would be left; of several processes all end behind the same step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator, self._came = accelerator, False
        self._holding = self._together = accelerator.num_processes > 1

    def __enter__(self) -> _Interrupts:
        """Take the signal, in the thread that alone gets any."""
        self._taken = threading.current_thread() is threading.main_thread()
        if self._taken:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        """Give it back."""
        if self._taken:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Yield an interrupt comes at the end; of several processes to all, if it came to one."""
        self._holding = True
        yield
        self._holding = self._together
        came = torch.tensor(float(self._came), device=self._accelerator.device)
        if self._accelerator.reduce(came, "sum"):
            raise KeyboardInterrupt

    def _handle(self, *_: Any) -> None:
        self._came = True
        if not self._holding:
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
    """Return the gradients of this process' share of a batch; returns the mean of every loss."""
    plain: Objective = accelerator.unwrap_model(objective)
    share = plain.share(streams, step, recipe)
    micro_batches = np.split(share, len(share) // recipe.micro_batch)
    total = torch.zeros(plain.n_losses, device=accelerator.device)
    for i, micro in enumerate(micro_batches):
        last = i + 1 == len(micro_batches)  # sharded gradients are reduced every time: whole ones would not fit
        with accelerator.no_sync(objective) if not last else nullcontext():
            with accelerator.autocast():
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
