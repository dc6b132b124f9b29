"""Multi-token language models on top of any transformers decoder (DynaMo, arXiv 2405.00888)."""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .limits import MAX_HEADS, MAX_LOOK_AHEAD, MAX_RANK

if TYPE_CHECKING:
    from .drafter import DrafterModel
    from .joint import CPModel
    from .look_ahead import LookAheadModel
    from .parallel import MultiTokenModel
    from .registry import DRAFTERS, drafters_of, has_drafter

# Before huggingface_hub is imported, which reads it once; a user may have said otherwise.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

DEFAULT_CHECKPOINT = Path(__file__).parent / "default"
"""Folder of the checkpoint that ships with the package: a three-token model of Python source code."""

__all__ = [
    "DEFAULT_CHECKPOINT",
    "DRAFTERS",
    "MAX_HEADS",
    "MAX_LOOK_AHEAD",
    "MAX_RANK",
    "CPModel",
    "CheckpointError",
    "DrafterModel",
    "LookAheadModel",
    "MultiTokenModel",
    "drafters_of",
    "has_drafter",
]

_MODULES = {
    "CPModel": "joint",
    "DRAFTERS": "registry",
    "DrafterModel": "drafter",
    "LookAheadModel": "look_ahead",
    "MultiTokenModel": "parallel",
    "drafters_of": "registry",
    "has_drafter": "registry",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when they are needed: a command's --help needs the limits alone."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
