"""Checkpoint folders: an ordinary HF model for the base, and beside it one file for every drafter trained on it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from .errors import CheckpointError


def load_base(name: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a base causal LM from a local folder or the Hub, from safetensors alone.

    Args:
        name: folder or Hub id.
        dtype: the parameters' type after loading, whatever they are stored as.

    Raises:
        CheckpointError: no such model, no safetensors weights, or remote code would be needed.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(name), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot load a base model from '{name}': {_first_line(error)}") from error


def find_file(name: str | Path, file: str) -> str | None:
    """Where a file of a folder or Hub repository lies; None if it has no such file."""
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    try:
        return cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None


def read_tensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: it is none, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
