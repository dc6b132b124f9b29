"""The small files of a bundle."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from dynamo_runtime.bundle import MANIFEST, sha256

from .errors import WriteError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, {} if there is no such file.

    Raises:
        WriteError: If it is not one.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WriteError(f"{path} is not readable: {error}") from error
    if not isinstance(content, dict):
        raise WriteError(f"{path} is not a JSON object")
    return content


def listed_files(staged: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but the manifest."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(staged.iterdir())
        if path.name != MANIFEST
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def version(distribution: str) -> str:
    """Version of an installed distribution, "unknown" if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
