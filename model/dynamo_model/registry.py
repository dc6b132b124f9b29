"""Every kind of drafter a checkpoint may hold: the one place that knows them all."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import find_file
from .drafter import DrafterModel
from .joint import CPModel
from .look_ahead import LookAheadModel
from .parallel import MultiTokenModel

DRAFTERS: dict[str, type[DrafterModel]] = {each.kind: each for each in (MultiTokenModel, CPModel, LookAheadModel)}
"""Models with a drafter, by its kind."""


def has_drafter(name: str | Path, kind: str) -> bool:
    """Whether a folder or Hub repository holds a drafter of this kind beside its base model."""
    return find_file(name, DRAFTERS[kind].file) is not None


def drafters_of(name: str | Path) -> list[str]:
    """Kinds of the drafters that a folder or Hub repository holds beside its base model."""
    return [kind for kind in DRAFTERS if has_drafter(name, kind)]
