"""Where a checkpoint comes from: a folder, the Hub, or the package itself; and what is read from it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dynamo_model import DEFAULT_CHECKPOINT, CheckpointError, MultiTokenModel, has_heads
from dynamo_model.checkpoint import load_base

from .errors import ExportError

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


def load_model(folder: Path, heads: int | None) -> tuple[PreTrainedModel, MultiTokenModel | None]:
    """Loads what is to be exported, in fp32.

    Args:
        folder: The checkpoint.
        heads: Token heads wanted; 0 for the plain language model, None for all there are.

    Returns:
        The base, and the multi-token model around it unless the export is plain.

    Raises:
        ExportError: If it does not load, has no heads, or fewer than wanted.
    """
    try:
        if heads == 0:
            base = load_base(folder, torch.float32).eval()
            return base, None
        if not has_heads(folder):
            raise ExportError(
                f"{folder} is a plain base model without token heads: train them first with "
                f"`dynamo-train heads`, or export the plain model with --heads 0"
            )
        model = MultiTokenModel.load(folder, torch.float32).eval()
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    if heads is not None:
        if not 2 <= heads <= model.n_heads:
            raise ExportError(f"--heads must be 0 (the plain model) or 2 to {model.n_heads} here, not {heads}")
        model.heads = model.heads[: heads - 1]
    return model.base, model


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, {} if there is no such file.

    Raises:
        ExportError: If it is not one.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} is not readable: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} is not a JSON object")
    return content
