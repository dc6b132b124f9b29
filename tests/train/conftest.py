"""What the tests of training share: a short recipe, a record of a corpus, and a run that is interrupted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dynamo_train import loop
from dynamo_train.objective import Objective
from dynamo_train.recipe import Recipe
from dynamo_train.tokens import CorpusRecord, TokenStreams

torch.set_num_threads(1)  # models are tiny, and threads that wait for each other cost more than they do


@pytest.fixture
def recipe() -> Recipe:
    """Six steps of two micro-batches; modules override what they need otherwise."""
    return Recipe(
        steps=6,
        sequences=4,
        length=8,
        micro_batch=2,
        optimizer="adamw",
        base_lr=1e-3,
        heads_lr=1e-2,
        shared_gradient_scale=0.1,
        freeze_base=False,
        weight_decay=0.1,
        warmup=0.01,
        clip=1.0,
        precision="no",
        seed=3,
    )


@pytest.fixture
def record() -> CorpusRecord:
    """Of a corpus that is not there."""
    return CorpusRecord("test", 2, 1, 500, 400, 100, 6.0, "0" * 64)


@pytest.fixture
def whole_and_resumed(
    recipe: Recipe, streams: TokenStreams, tmp_path: Path
) -> Callable[[Callable[[], Objective]], list[dict[str, torch.Tensor]]]:
    """The weights after a run in one go, and after one that Ctrl-C ended in its fourth step and that then went on."""

    def train(objective: Objective, folder: str) -> dict[str, torch.Tensor]:
        loop.train(objective, streams, recipe, tmp_path / folder, checkpoint_every=2, checkpoint_seconds=0)
        return objective.model.state_dict()

    def run(make: Callable[[], Objective]) -> list[dict[str, torch.Tensor]]:
        whole = train(make(), "whole")
        cut = make()
        with interrupted(cut, at=3 * recipe.sequences // recipe.micro_batch), pytest.raises(KeyboardInterrupt):
            train(cut, "cut")
        return [whole, train(make(), "cut")]

    return run


@contextmanager
def interrupted(objective: Objective, at: int) -> Iterator[None]:
    """Ctrl-C at a micro-batch, counted from 0."""
    micro_batches = iter(range(at + 1))

    def interrupt(*_: object) -> None:
        if next(micro_batches) == at:
            raise KeyboardInterrupt

    with objective.register_forward_pre_hook(interrupt):
        yield
