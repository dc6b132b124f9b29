"""What is exported: which checkpoint, and which of the drafters that it holds."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dynamo_model import DEFAULT_CHECKPOINT, DRAFTERS, CheckpointError, DrafterModel, drafters_of
from dynamo_model.checkpoint import load_base
from dynamo_model.sources import KNOWN, Checkpoint, check_base, find_checkpoint

from .errors import ExportError
from .registry import PREFERRED, exported

log = logging.getLogger("dynamo_export")


def find_source(name: str | Path | None) -> Checkpoint:
    """Return the checkpoint that is to be exported, fetched first if it is not on this machine.

    Args:
        name: A folder, a GGUF file, the name of a known model, a Hub id, or None for the default that ships with the
            package.

    Raises:
        ExportError: There is nothing of that name, or it cannot be fetched.
    """
    if name is None and not (DEFAULT_CHECKPOINT / "config.json").is_file():
        raise ExportError(f"the default checkpoint is missing from this installation ({DEFAULT_CHECKPOINT})")
    try:
        checkpoint = find_checkpoint(DEFAULT_CHECKPOINT if name is None else name)
        check_base(checkpoint)
        return checkpoint
    except CheckpointError as error:
        raise ExportError(str(error)) from error


def load_model(
    checkpoint: Checkpoint, heads: int | None, kind: str | None = None
) -> tuple[PreTrainedModel, DrafterModel | None]:
    """Load what is to be exported, in fp32.

    Args:
        checkpoint: From `find_source`.
        heads: Parallel token heads wanted; 0 for the plain language model, None for all there are.
        kind: Drafter wanted; None for parallel heads where there are any, else for the only one of the checkpoint.

    Returns:
        The base, and the drafter around it unless the export is plain.

    Raises:
        ExportError: If it does not load, has no such drafter, or fewer heads than wanted.
    """
    if kind is not None and kind not in DRAFTERS:
        raise ExportError(f"--drafter must be one of {', '.join(DRAFTERS)}, not {kind}")
    try:
        if heads is None and kind is None and checkpoint.name in KNOWN and not drafters_of(checkpoint):
            log.info("%s has no heads: exporting the plain model", checkpoint.name)
            heads = 0
        if heads == 0:
            return load_base(checkpoint, torch.float32).eval(), None
        model = DRAFTERS[_choose(checkpoint, heads, kind)].load(checkpoint, torch.float32).eval()
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    if heads is not None:
        exported(model.base, model).keep_heads(heads)
    return model.base, model


def _choose(checkpoint: Checkpoint, heads: int | None, wanted: str | None) -> str:
    """Return the kind of drafter to export from a checkpoint that may hold several."""
    there = drafters_of(checkpoint)
    if not there and wanted is None:
        raise ExportError(
            f"{checkpoint.name} is a plain base model without token heads: train them first with "
            f"`dynamo-train {DRAFTERS[PREFERRED].command}`, or export the plain model with --heads 0"
        )
    if wanted is None and heads is None and PREFERRED not in there and len(there) > 1:
        raise ExportError(f"{checkpoint.name} has the drafters {' and '.join(there)}: choose one with --drafter")
    kind = wanted or (PREFERRED if heads is not None or PREFERRED in there else there[0])
    if kind not in there:
        others = f"only {' and '.join(there)}" if there else "nor any other"
        raise ExportError(
            f"{checkpoint.name} has no {kind} drafter, {others}: train it first with "
            f"`dynamo-train {DRAFTERS[kind].command}`"
        )
    return kind
