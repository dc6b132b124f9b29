"""The folder for everything that is kept, and bundles in it that go by the name of a model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dynamo_runtime import BundleError, Engine
from dynamo_runtime.bundle import load_bundle
from dynamo_runtime.cache import cache_folder, kept_bundle
from dynamo_runtime.cli.run import main
from dynamo_runtime.device.profile import profiles_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a working directory without anything in it."""
    monkeypatch.setenv("DYNAMO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def keep(bundle: Path, precision: str, modified: int) -> Path:
    """Puts a bundle into the cache as the model "tiny", exported at some time."""
    folder = kept_bundle("tiny", precision)
    shutil.copytree(bundle.parent, folder)
    os.utime(folder / "dynamo_config.json", (modified, modified))
    return folder


def test_one_folder_for_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless profiles have one of their own; without either, where the system keeps such things."""
    monkeypatch.delenv("DYNAMO_PROFILES", raising=False)
    assert (cache_folder(), profiles_folder()) == (cache, cache / "profiles")
    monkeypatch.setenv("DYNAMO_PROFILES", "/elsewhere")
    assert profiles_folder() == Path("/elsewhere")
    monkeypatch.delenv("DYNAMO_CACHE")
    assert cache_folder().name == "dynamo-edge"


def test_the_newest_of_a_name(cache: Path, plain: Path, multi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its precision; for every command, as all load bundles alike."""
    old, new = keep(plain, "int8-dynamic", 1_000), keep(multi, "int8", 2_000)
    keep(plain, "fp32", 500)
    assert load_bundle("tiny").folder == new
    assert Engine("tiny", threads=1).bundle.folder == new
    os.utime(old / "dynamo_config.json", (3_000, 3_000))
    assert load_bundle("tiny").folder == old
    assert main(["-m", "tiny", "-p", "def", "--max-new-tokens", "4", "--threads", "1"]) == 0
    assert main(["tiny", "def", "--max-new-tokens", "4", "--threads", "1"]) == 0
    assert "error" not in capsys.readouterr().err


def test_what_is_here_comes_first(cache: Path, plain: Path, multi: Path) -> None:
    """A folder of the same name in the working directory."""
    keep(plain, "fp32", 500)
    shutil.copytree(multi.parent, "tiny")
    assert load_bundle("tiny").folder == Path("tiny")


def test_no_bundle_of_that_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that makes one is in the line; what cannot be a name is a path."""
    with pytest.raises(BundleError, match="`dynamo-export -m tiny --quantize int8` makes one"):
        load_bundle("tiny")
    for path in ("tiny/model", "../tiny", "tiny.onnx", ""):
        with pytest.raises(BundleError, match=r"does not exist|is not a bundle"):
            load_bundle(path)
    assert main(["-m", "tiny", "-p", "def"]) == 1
    assert capsys.readouterr().err.startswith("dynamo-run: error: tiny does not exist, and the cache has no bundle")
