"""Tiny bundles, made once per session."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import handmade

from dynamo_runtime import Engine


@pytest.fixture(autouse=True, scope="session")
def no_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Whatever profiles are kept on this machine are out of sight."""
    folder = tmp_path_factory.mktemp("profiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNAMO_PROFILES", str(folder))
        yield folder


@pytest.fixture(scope="session")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX file of a bundle with three heads and random counts."""
    return handmade.write_bundle(tmp_path_factory.mktemp("bundles") / "multi", 3)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX file of the plain bundle of the same weights."""
    return handmade.write_bundle(tmp_path_factory.mktemp("bundles") / "plain", 1)


@pytest.fixture(scope="session")
def shared_engine(multi: Path) -> Engine:
    """An engine on `multi`; its cache carries over from test to test."""
    return Engine(multi, provider="cpu", threads=1)


@pytest.fixture
def engine(shared_engine: Engine) -> Engine:
    """An engine on `multi` with an empty cache."""
    shared_engine.reset()
    return shared_engine


class Copy:
    """A private copy of a bundle, to be damaged."""

    def __init__(self, folder: Path):
        self.folder = folder

    def edit(self, **changes: Any) -> None:
        """Change manifest fields; a value of None removes the field."""
        path = self.folder / "dynamo_config.json"
        manifest = json.loads(path.read_text())
        manifest |= changes
        path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))

    def relist(self) -> None:
        """Make the manifest agree with the files as they are now."""
        path = self.folder / "dynamo_config.json"
        manifest = json.loads(path.read_text())
        del manifest["files"]
        handmade.write_manifest(self.folder, **manifest)


@pytest.fixture
def copied(multi: Path, tmp_path: Path) -> Copy:
    """A copy of `multi` for one test."""
    folder = tmp_path / "copy"
    shutil.copytree(multi.parent, folder)
    return Copy(folder)
