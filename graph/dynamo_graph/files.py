"""The small files of a bundle."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from dynamo_runtime.files import read_object
from dynamo_runtime.manifest import MANIFEST, REPORT

from .errors import WriteError

_MOST_BYTES = 64 << 20  # reports are the largest, with a row for every comparison


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, {} if there is no such file.

    Raises:
        WriteError: If it is not one.
    """
    if not path.is_file():
        return {}
    try:
        return read_object(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise WriteError(f"{path} is not readable: {error}") from error


def read_report(folder: Path) -> dict[str, Any]:
    """Return what proves a bundle so far; {} if nothing does.

    Raises:
        WriteError: There is a report, and it is not readable.
    """
    if (folder / REPORT).is_file():
        return read_json(folder / REPORT)
    older = read_json(folder / MANIFEST)  # of version 2, which held the proofs itself
    return {"parity": older["parity"]} if older.get("parity") else {}


def write_report(folder: Path, **proofs: Any) -> None:
    """Add proofs to a bundle's report, by name: "parity", "gates"."""
    before = read_json(folder / REPORT)
    if before or proofs:
        write_json(folder / REPORT, before | proofs)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def version(distribution: str) -> str:
    """Return the version of an installed distribution, "unknown" if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
