"""What an export says of a bundle: to a device in the manifest, to whoever doubts it in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import checkpoints

from dynamo_runtime.bundle import load_bundle
from dynamo_runtime.manifest import MANIFEST, REPORT

FolderOf = Callable[[str], Path]


@pytest.mark.parametrize("name", ["neox", "phi", "cp-neox", "lookahead-llama-tied"])
def test_manifest_is_small_and_is_read_back(name: str, bundle: FolderOf) -> None:
    """A device reads no proofs, and what it reads is what was written; the report is listed as any file."""
    folder = bundle(name)
    written = (folder / MANIFEST).read_text()
    loaded = load_bundle(folder, verify=True)
    assert loaded.to_json() == written and len(written.encode()) < 4096
    assert {*loaded.files} == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert REPORT in loaded.files and "parity" not in json.loads(written)
    assert loaded.pass_bytes is not None and 0 < loaded.pass_bytes.plain < loaded.graph_bytes
    assert checkpoints.read_report(folder)["parity"]["passed"]
