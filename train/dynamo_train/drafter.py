"""What training puts on a base: the interface of all drafters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from dynamo_model import DrafterModel
from dynamo_model.sources import Checkpoint

from .objective import Objective
from .recipe import Recipe
from .tokens import TokenStreams


@dataclass(frozen=True)
class Start:
    """What a drafter is put on, and what it may be made from.

    Attributes:
        checkpoint: The base's, with the drafters beside it.
        base: The base, which has passed `dynamo_model.preflight.preflight`.
        streams: Training and held-out tokens, made when they are asked for first, which may take long.
        work: Folder for what is made on the way.
    """

    checkpoint: Checkpoint
    base: PreTrainedModel
    streams: Callable[[], TokenStreams]
    work: Path


class NewDrafter(ABC):
    """A drafter that is yet to be trained; a subclass is a frozen dataclass of what decides it besides the recipe.

    Attributes:
        model: Base and drafter; its `command` is the name of the stage in `training.json`.
        title: In the model card.
        freezes_base: Whether the base stays as it is whatever the recipe says.
        keeps: Whether it starts as the drafter of its kind beside the base, not anew.
    """

    model: ClassVar[type[DrafterModel]]
    title: ClassVar[str]
    freezes_base: ClassVar[bool] = False
    keeps: bool = False

    @property
    def reads_states(self) -> bool:
        """Whether it is trained on what the base said, which does not run itself."""
        return False

    @property
    def reads_ahead(self) -> bool:
        """Whether it reads the text before it is trained on it."""
        return False

    @abstractmethod
    def objective(self, start: Start, recipe: Recipe) -> Objective:
        """Return the drafter on a base, with the losses it is trained by.

        Args:
            start: The base, and what there is besides.
            recipe: Of the training.

        Raises:
            CheckpointError: The drafter cannot be put on it.
            TrainingError: The recipe does not go with it, or there is something about the text.
        """

    @classmethod
    def card_line(cls, stage: dict[str, Any], run: str, held_out: str) -> str:
        """Return what the model card says of the training.

        Args:
            stage: The record in `training.json`.
            run: Steps, optimizer and so on, in words.
            held_out: The figures, in words, for drafters of which the card has no table.
        """
        return run
