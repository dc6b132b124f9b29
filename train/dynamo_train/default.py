"""The embedded default: a small model of Python with every kind of drafter, trained on what any Python comes with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dynamo_runtime.corpus import HELD_OUT_PERCENT, STANDARD_LIBRARY

from . import pipeline
from .card import write_card
from .corpus import PACKAGE
from .joint import JointHead
from .look_ahead import LookAheadEmbeddings
from .parallel import TokenHeads
from .pipeline import BaseShape, Job
from .recipe import Recipe

N_HEADS = 5
# The base stops when the standard library has no more to teach it; the heads' stage goes on with the packages that
# training itself depends on.  None of them falls among the held-out groups.
_PACKAGES = (
    "accelerate", "fsspec", "huggingface_hub", "jinja2", "mpmath", "networkx", "numpy", "rich", "tqdm", "typer",
)  # fmt: skip
WIDER_CORPUS = "+".join([STANDARD_LIBRARY, *(PACKAGE + name for name in _PACKAGES)])
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
HEADS_RECIPE = replace(BASE_RECIPE, steps=750, base_lr=2e-3, shared_gradient_scale=0.5, early_stop=False, seed=1)


# Every drafter on the frozen base gets the same budget.
DRAFTER_RECIPE = replace(
    BASE_RECIPE, steps=200, sequences=4, base_lr=0.0, freeze_base=True, validate_every=0, early_stop=False, seed=2
)
CP_TOKENS, CP_RANK, CP_BALANCE = 4, 4, 0.01
N_LOOK_AHEAD, ANCHORS = 4, 128
LOOKAHEAD_RECIPE = replace(DRAFTER_RECIPE, optimizer="adamw", heads_lr=1e-2)
MIN_COUNTS = [1, 1, 2]


def train_default(out: Path, work: Path) -> None:
    """Rebuild the checkpoint that ships with the package; the same call again goes on where it stopped.

    Args:
        out: The new folder.
        work: Tokens and checkpoints of the stages.
    """
    base, heads, joint, last = (work / name for name in ("base", "heads", "cp", "lookahead"))
    if not base.exists():
        pipeline.train_base(_job(base, STANDARD_LIBRARY), SHAPE, BASE_RECIPE)
    if not heads.exists():
        pipeline.train_drafter(str(base), _job(heads), TokenHeads(N_HEADS), HEADS_RECIPE)
    if not joint.exists():
        train_default_cp(heads, joint, CP_RANK, work / "cp-work")
    if not last.exists():
        embeddings = LookAheadEmbeddings(N_LOOK_AHEAD, ANCHORS)
        pipeline.train_drafter(str(joint), _job(last), embeddings, LOOKAHEAD_RECIPE)
    pipeline.add_counts(_job(last), MIN_COUNTS)
    pipeline.convert(last, out, torch.float16)
    write_card(out, STANDARD_LIBRARY, HELD_OUT_PERCENT)


def train_default_cp(base: Path, out: Path, rank: int, work: Path) -> None:
    """Train the default's joint head, or one of another rank with the same budget, to compare."""
    job = Job(out, WIDER_CORPUS, HELD_OUT_PERCENT, work)
    pipeline.train_drafter(str(base), job, JointHead(CP_TOKENS, rank, CP_BALANCE), DRAFTER_RECIPE)


def _job(out: Path, source: str = WIDER_CORPUS) -> Job:
    return Job(out, source, HELD_OUT_PERCENT, out.with_name(f"{out.name}-work"))
