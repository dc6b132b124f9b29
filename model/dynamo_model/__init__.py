"""Multi-token language models on top of any transformers decoder (DynaMo, arXiv 2405.00888)."""

from pathlib import Path

from .checkpoint import CheckpointError, has_heads
from .cp import CPModel
from .lookahead import LookAheadModel
from .multi_token import MAX_HEADS, MultiTokenModel

DEFAULT_CHECKPOINT = Path(__file__).parent / "default"
"""Folder of the checkpoint that ships with the package: a three-token model of Python source code."""

__all__ = [
    "DEFAULT_CHECKPOINT",
    "MAX_HEADS",
    "CPModel",
    "CheckpointError",
    "LookAheadModel",
    "MultiTokenModel",
    "has_heads",
]
