"""Checkpoint folders: an ordinary HF model for the base, and beside it one file for every drafter trained on it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

FILES = {"parallel": "heads.safetensors", "cp": "cp.safetensors", "lookahead": "lookahead.safetensors"}
"""Kinds of drafters, and the file each is kept in."""

COMMANDS = {"parallel": "heads", "cp": "cp", "lookahead": "lookahead"}
"""The subcommand of ``dynamo-train`` that makes each."""


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


def has_heads(name: str | Path, kind: str = "parallel") -> bool:
    """Whether a folder or Hub repository holds a drafter of this kind beside its base model."""
    return _find(name, FILES[kind]) is not None


def read_drafter(name: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Read what a drafter adds to its base.

    Args:
        name: folder or Hub id.
        kind: a key of :data:`FILES`.

    Returns:
        The tensors, and the whole numbers that say their shape (such as ``n_heads``).

    Raises:
        CheckpointError: there is no such drafter, or its file is not what its name says.
    """
    path = _find(name, FILES[kind])
    if path is None:
        raise CheckpointError(
            f"'{name}' has no {FILES[kind]}: train it first with "
            f"`dynamo-train {COMMANDS[kind]} {name} --data TEXT --out FOLDER`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error
    if metadata.get("kind") != kind:
        raise CheckpointError(f"{path} does not say that it holds a drafter of kind {kind}")
    return tensors, {key: int(value) for key, value in metadata.items() if value.isdigit()}


def save_drafter(folder: Path, kind: str, tensors: dict[str, Tensor], **shape: int) -> None:
    """Write what a drafter adds to its base, which :func:`read_drafter` gives back."""
    metadata = {"kind": kind, "format": "pt"} | {key: str(value) for key, value in shape.items()}
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / FILES[kind], metadata=metadata)


def fill(own: dict[str, Tensor], tensors: dict[str, Tensor], kind: str) -> None:
    """Copy a drafter's tensors into its module's.

    Raises:
        CheckpointError: names or shapes differ.
    """
    if own.keys() != tensors.keys() or any(own[k].shape != tensors[k].shape for k in own):
        raise CheckpointError(f"{FILES[kind]} does not fit the base model's configuration")
    for name, tensor in own.items():
        tensor.data.copy_(tensors[name])


def _find(name: str | Path, file: str) -> str | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    try:
        return cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
