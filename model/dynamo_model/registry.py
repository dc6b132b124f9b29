"""Every kind of drafter a checkpoint may hold: the one place that knows them all."""

from __future__ import annotations

from pathlib import Path

from .drafter import DrafterModel
from .joint import CPModel
from .look_ahead import LookAheadModel
from .parallel import MultiTokenModel
from .sources import Checkpoint, find_checkpoint

DRAFTERS: dict[str, type[DrafterModel]] = {each.kind: each for each in (MultiTokenModel, CPModel, LookAheadModel)}
"""Models with a drafter, by its kind."""


def has_drafter(name: str | Path | Checkpoint, kind: str) -> bool:
    """Tell whether a checkpoint holds a drafter of this kind beside its base model."""
    return find_checkpoint(name).file(DRAFTERS[kind].file) is not None


def drafters_of(name: str | Path | Checkpoint) -> list[str]:
    """Kinds of the drafters that a checkpoint holds beside its base model."""
    checkpoint = find_checkpoint(name)
    return [kind for kind in DRAFTERS if has_drafter(checkpoint, kind)]
