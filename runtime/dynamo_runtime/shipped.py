"""Drafters that ship for a model known by name, and whether a bundle of that name was made with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import BundleError
from .files import sha256
from .manifest import Manifest
from .topology import Plain


def shipped_with(name: str) -> Path | None:
    """Return the folder of what ships for a model of this name; None where that package is not installed.

    It is a folder of `dynamo_model`, which a device need not have, and which is not imported.
    """
    found = importlib.util.find_spec("dynamo_model")
    return None if found is None or found.origin is None else Path(found.origin).parent / name


def outdated(name: str, manifest: Manifest) -> str | None:
    """Say what is outdated about the drafters of a bundle that goes by the name of a model.

    Nothing is said of a bundle that was exported plain although there were drafters, and of one with drafters whose
    manifest does not say which: earlier versions did not record them.

    Args:
        name: Of the model.
        manifest: Of its bundle.

    Returns:
        One line that says what to do; None where nothing ships for the model, or nothing is wrong, or nobody knows.
    """
    folder = shipped_with(name)
    shipped = [] if folder is None else sorted(folder.glob("*.safetensors"))
    plain, recorded = manifest.topology.kind == Plain.kind, manifest.source.drafters
    if not shipped or plain == bool(recorded):
        return None
    scheme = "" if manifest.precision == "fp32" else f" --quantize {manifest.precision}"
    command = f"dynamo-export -m {name}{scheme}"
    if plain:
        return (
            f"{name}: its bundle in the cache was exported when no drafter shipped for this model; `{command}` makes "
            "it anew with the one that ships now (with --heads 0 as well: plain, and this is not said again)"
        )
    try:
        current = {path.name: sha256(path) for path in shipped}
    except BundleError:  # the bundle runs without knowing
        return None
    if current == recorded:
        return None
    return (
        f"{name}: its bundle in the cache has another drafter than the one that ships now; `{command}` makes it anew "
        "with that"
    )
