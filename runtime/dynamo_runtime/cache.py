"""The one folder for everything that is kept between runs: profiles, models fetched, bundles exported by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE = "DYNAMO_CACHE"
"""Environment variable that names the folder."""


def cache_folder() -> Path:
    """`DYNAMO_CACHE`, or else a folder of ours where the system keeps such things."""
    if given := os.environ.get(CACHE):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "dynamo-edge"


def bundles_folder() -> Path:
    """Return where bundles lie that were exported by the name of a model, in a folder NAME/PRECISION each."""
    return cache_folder() / "bundles"


def kept_bundle(name: str, precision: str) -> Path:
    """Return the folder for the bundle of a model, by its name, in one precision."""
    return bundles_folder() / name / precision
