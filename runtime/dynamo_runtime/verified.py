"""Which files were found to be whole: so that a bundle is read through once, and again when it changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .cache import cache_folder
from .errors import OutputError
from .files import read_object, write_whole

State = list[Any]
"""Size, times, number and expected SHA-256 of a file, which do not all stay the same where its content changes."""

_MOST_BYTES = 4 << 20
_MOST_BUNDLES = 200


def state(path: Path, sha256: str) -> State:
    """Return a file as it is now.

    Args:
        path: Where it lies.
        sha256: That its content ought to have.
    """
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, sha256]


def recall(folder: Path) -> dict[str, State]:
    """Return the files of a bundle when they were last found to be whole; empty if they never were, or nobody knows."""
    try:
        return read_object(_record(folder), _MOST_BYTES)
    except (OSError, ValueError):
        return {}


def remember(folder: Path, states: dict[str, State]) -> None:
    """Keep what was found; a cache that cannot be written costs time at the next load, nothing else."""
    path = _record(folder)
    with contextlib.suppress(OutputError, OSError):
        write_whole(path, json.dumps(states))
        records = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
        for old in records[:-_MOST_BUNDLES]:
            old.unlink(missing_ok=True)


def _record(folder: Path) -> Path:
    """Return where it is kept: by the bundle's folder, whose name is nobody's business."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return cache_folder() / "verified" / f"{name[:32]}.json"
