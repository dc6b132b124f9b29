"""Drafters that ship for models known by name: each is rebuilt by one command, from the base's own package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamo_model.sources import KNOWN
from dynamo_runtime.corpus import HELD_OUT_PERCENT
from dynamo_runtime.files import write_whole
from dynamo_runtime.tables import Table

from . import pipeline
from .parallel import TokenHeads
from .pipeline import CARD_FILE, Job
from .recipe import Recipe


@dataclass(frozen=True)
class KnownDrafters:
    """What ships for a known model.

    Attributes:
        heads: Its heads.
        recipe: Of their training, on the model's own text.
        min_counts: Of the n-grams that are kept, see `dynamo_train.cooccurrence.count_ngrams`.
        took: What the training of those that ship took, states of the text left out.
    """

    heads: TokenHeads
    recipe: Recipe
    min_counts: list[int]
    took: str


KNOWN_DRAFTERS = {
    "smollm2": KnownDrafters(
        heads=TokenHeads(4, draft_vocab=8192, condition=True, init="copied", cache=True, loss="kl"),
        recipe=Recipe(
            steps=27_000,
            sequences=32,
            length=512,
            micro_batch=32,
            optimizer="adamw",
            base_lr=0.0,
            heads_lr=5e-3,
            shared_gradient_scale=1.0,
            freeze_base=True,
            weight_decay=0.1,
            warmup=0.01,
            clip=1.0,
            precision="bf16",
            seed=0,
            validate_every=1000,
            validation_tokens=131_072,
        ),
        min_counts=[1, 2, 4],
        took="6.1 minutes on one NVIDIA H100",
    ),
}
"""By the names of `dynamo_model.sources.KNOWN`."""


def train_known(name: str, data: str, out: Path, work: Path, steps: int | None = None) -> None:
    """Train what ships for a known model, and pack it; the same call again goes on where it stopped.

    Args:
        name: Of the model.
        data: Text of the model's own, as `dynamo-train texts` writes it.
        out: The new folder: drafters at 8 bits, n-gram counts, record and card.
        work: Tokens, states and checkpoints.
        steps: Of the training, if not those of the recipe.

    Raises:
        CheckpointError: The model's package cannot be had.
        TrainingError: There is something about the text or the folders.
    """
    known, trained = KNOWN_DRAFTERS[name], work / "heads"
    job = Job(trained, data, HELD_OUT_PERCENT, work)
    if not trained.exists():
        recipe = known.recipe if steps is None else replace(known.recipe, steps=steps)
        pipeline.train_drafter(name, job, known.heads, recipe)
    pipeline.add_counts(job, known.min_counts)
    stage = pipeline.read_record(trained)[TokenHeads.model.command]
    write_whole(trained / CARD_FILE, card_text(name, stage))
    pipeline.pack(trained, out)


def card_text(name: str, stage: dict[str, Any]) -> str:
    """Return the card of a known model's heads.

    Args:
        name: Of the model.
        stage: The record of the training.
    """
    model, corpus, recipe, figures = KNOWN[name], stage["corpus"], stage["recipe"], stage["figures"]
    heads = sum(key.startswith("accepted_") for key in figures)
    seen = stage["steps"] * recipe["sequences"] * recipe["length"]
    rows = [
        [f"draft {i}", *(f"{figures[f'{kind}_{i}']:.3f}" for kind in ("greedy", "accepted")), f"{ppl:.1f}"]
        for i, ppl in enumerate((figures[f"ppl_{n}"] for n in range(2, heads + 2)), start=1)
    ]
    rows.append(["tokens a pass", f"{figures['greedy_tokens_a_pass']:.2f}", f"{figures['tokens_a_pass']:.2f}", ""])
    columns = ["", "the model's first choice, if those before it were", "the text, with all before it", "PPL_n"]
    return f"""# {heads} further token heads for {model.title}

They draft for the model that goes by the name `{name}`: `dynamo-export -m {name}` puts them into its bundle. The model
itself is not here, and stays as it is: {model.origin}.

- Text: {corpus["documents"]:,} texts that the model wrote itself (`dynamo-train texts`): {corpus["train_tokens"]:,}
  tokens, and {corpus["held_out_tokens"]:,} that are held out (SHA-256 `{corpus["sha256"][:16]}…`).
- Heads: a decoder layer each, told the token in front, choosing among the {stage["draft_vocabulary"]:,} most frequent
  tokens ({figures["coverage"]:.1%} of held-out ones); stored at 8 bits.
- Training: on what the frozen model says of the text, for {stage["steps"]:,} steps of {recipe["sequences"]} ×
  {recipe["length"]} tokens, which are {seen / 1e6:.1f} M tokens or {seen / corpus["train_tokens"]:.1f} epochs, with
  {recipe["optimizer"]} at a learning rate of {recipe["heads_lr"]:g}; of those that ship {KNOWN_DRAFTERS[name].took}.
- `dynamo-train default {name} --data CORPUS --out FOLDER` rebuilds this folder.

{Table("How often a draft is right, on held-out text", columns, rows).markdown()}
"""
