"""Where a checkpoint comes from: a folder, the Hub, or the package itself; and what is read from it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dynamo_model import DEFAULT_CHECKPOINT, DRAFTERS, CheckpointError, DrafterModel, drafters_of
from dynamo_model.checkpoint import load_base

from .errors import ExportError
from .registry import PREFERRED, exported

HUB_FILES = ["*.json", "*.safetensors", "cooccurrence.npz"]  # never a pickle
log = logging.getLogger("dynamo_export")


def find_checkpoint(name: str | Path | None) -> Path:
    """The local folder of a checkpoint, fetched from the Hub first if it is a Hub id.

    Args:
        name: A folder, a Hub id, or None for the default that ships with the package.

    Raises:
        ExportError: There is no such folder, or the Hub does not have it or cannot be reached.
    """
    if name is None:
        if not (DEFAULT_CHECKPOINT / "config.json").is_file():
            raise ExportError(f"the default checkpoint is missing from this installation ({DEFAULT_CHECKPOINT})")
        return DEFAULT_CHECKPOINT
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ExportError(f"{folder} is not a checkpoint: it has no config.json")
        return folder
    if folder.exists() or folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise ExportError(f"{name} is not a folder")
    return _fetch(str(name))


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    log.info("fetching %s from the Hub", repository)
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)  # every retry is a warning otherwise
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError as error:
        raise ExportError(f"there is no folder and no model on the Hub called {repository}") from error
    except LocalEntryNotFoundError as error:
        raise ExportError(f"{repository} is not a folder here, and the Hugging Face Hub cannot be reached") from error
    except Exception as error:  # the Hub client raises classes of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{repository} cannot be fetched from the Hub: {reason}") from error
    finally:
        hub_log.setLevel(level)


def load_model(folder: Path, heads: int | None, kind: str | None = None) -> tuple[PreTrainedModel, DrafterModel | None]:
    """Loads what is to be exported, in fp32.

    Args:
        folder: The checkpoint.
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
        if heads == 0:
            return load_base(folder, torch.float32).eval(), None
        model = DRAFTERS[_choose(folder, heads, kind)].load(folder, torch.float32).eval()
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    if heads is not None:
        exported(model.base, model).keep_heads(heads)
    return model.base, model


def _choose(folder: Path, heads: int | None, wanted: str | None) -> str:
    """The kind of drafter to export from a checkpoint that may hold several."""
    there = drafters_of(folder)
    if not there and wanted is None:
        raise ExportError(
            f"{folder} is a plain base model without token heads: train them first with "
            f"`dynamo-train {DRAFTERS[PREFERRED].command}`, or export the plain model with --heads 0"
        )
    if wanted is None and heads is None and PREFERRED not in there and len(there) > 1:
        raise ExportError(f"{folder} has the drafters {' and '.join(there)}: choose one with --drafter")
    kind = wanted or (PREFERRED if heads is not None or PREFERRED in there else there[0])
    if kind not in there:
        others = f"only {' and '.join(there)}" if there else "nor any other"
        raise ExportError(
            f"{folder} has no {kind} drafter, {others}: train it first with `dynamo-train {DRAFTERS[kind].command}`"
        )
    return kind
