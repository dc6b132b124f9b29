"""Checkpoint folders: an ordinary HF model for the base, plus ``heads.safetensors`` for the further heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

if TYPE_CHECKING:
    from .multi_token import MultiTokenModel

HEADS_FILE = "heads.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of a kind that is not supported; one clear line."""


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


def has_heads(name: str | Path) -> bool:
    """Whether a folder or Hub repository holds further heads beside its base model."""
    return _find_heads(name) is not None


def read_heads(name: str | Path) -> tuple[dict[str, Tensor], int]:
    """Read the further heads' tensors and the number of heads.

    Returns:
        Tensors named ``<head number>.<parameter>``, and n, the base's own head included.

    Raises:
        CheckpointError: there are no heads, or they are of a kind that is not known here.
    """
    path = _find_heads(name)
    if path is None:
        raise CheckpointError(
            f"'{name}' is a plain base model without token heads: train them first with "
            f"`dynamo-train heads {name} --data TEXT --out FOLDER`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error
    if metadata.get("kind") != "parallel" or not metadata.get("n_heads", "").isdigit():
        raise CheckpointError(f"{path} does not say that it holds parallel token heads")
    return tensors, int(metadata["n_heads"])


def save(model: MultiTokenModel, folder: Path) -> None:
    """Write ``model`` so that ``AutoModelForCausalLM`` loads its base and ``MultiTokenModel`` all of it."""
    model.base.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.head_state_dict().items()}
    metadata = {"kind": "parallel", "n_heads": str(model.n_heads), "format": "pt"}
    save_file(tensors, folder / HEADS_FILE, metadata=metadata)


def _find_heads(name: str | Path) -> str | None:
    if Path(name).is_dir():
        path = Path(name) / HEADS_FILE
        return str(path) if path.is_file() else None
    try:
        return cached_file(str(name), HEADS_FILE, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
