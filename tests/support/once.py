"""What every process of a test run needs, made by the one that needs it first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills; pytest-xdist's other workers wait for it. Treat as read-only.

    Args:
        factory: Of the session.
        name: Of what is made, one for the whole run.
        make: Given the folder, which is not there yet.
    """
    root = factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"
    folder, done = root / name, root / f"{name}.done"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # where making it failed before
            make(folder)
            done.touch()
    return folder
