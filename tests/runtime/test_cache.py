"""The folder for everything that is kept, and bundles in it that go by the name of a model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

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


# --- drafters that ship for a name ------------------------------------------------------------------------------------

NONE_SHIPPED = "was exported when no drafter shipped for this model; `dynamo-export -m tiny --quantize int8` makes it"
ANOTHER = "has another drafter than the one that ships now; `dynamo-export -m tiny` makes it anew"


@pytest.fixture
def ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what ships for "tiny" in an installation of `dynamo_model` that cannot be imported: empty."""
    folder = tmp_path / "site-packages/dynamo_model/tiny"
    folder.mkdir(parents=True)
    installed = SimpleNamespace(origin=str(folder.with_name("__init__.py")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed if name == "dynamo_model" else None)
    return folder


def made_from(bundle: Path, drafters: dict[str, str], precision: str) -> None:
    """Keep a bundle whose manifest says which drafters its checkpoint had."""
    folder = keep(bundle, precision, 1_000)
    content = json.loads((folder / "dynamo_config.json").read_text())
    content |= {"precision": precision, "source": {"drafters": drafters}}
    (folder / "dynamo_config.json").write_text(json.dumps(content))


OLD, NEW = ({"heads.safetensors": hashlib.sha256(weights).hexdigest()} for weights in (b"old heads", b"new heads"))


@pytest.mark.parametrize(
    ("drafted", "recorded", "precision", "told"),
    [
        (False, {}, "int8", NONE_SHIPPED),  # or by an earlier version, which is the same
        (False, OLD, "int8", ""),  # with --heads 0
        (True, OLD, "fp32", ANOTHER),
        (True, {**NEW, "cp.safetensors": "ab" * 32}, "fp32", ANOTHER),
        (True, NEW, "fp32", ""),
        (True, {}, "fp32", ""),  # by an earlier version: nobody knows
    ],
)
def test_a_name_whose_drafter_is_another_now(
    drafted: bool,
    recorded: dict[str, str],
    precision: str,
    told: str,
    cache: Path,
    ships: Path,
    plain: Path,
    multi: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line as it is loaded by name, and none where it is loaded by its path or nothing ships."""
    made_from(multi if drafted else plain, recorded, precision)
    (ships / "README.md").write_text("a card alone")
    load_bundle("tiny")
    assert not caplog.messages
    (ships / "heads.safetensors").write_bytes(b"new heads")
    load_bundle(kept_bundle("tiny", precision))
    assert not caplog.messages
    load_bundle("tiny")
    assert len(caplog.messages) == bool(told)
    assert all(told in message and message.startswith("tiny: its bundle in the cache ") for message in caplog.messages)


def test_the_command_says_it_once(cache: Path, ships: Path, multi: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And goes on."""
    made_from(multi, OLD, "fp32")
    (ships / "heads.safetensors").write_bytes(b"new heads")
    assert main(["-m", "tiny", "-p", "def", "--max-new-tokens", "4", "--threads", "1"]) == 0
    assert sum(ANOTHER in message for message in caplog.messages) == 1


def test_without_the_package_that_drafters_ship_in(
    cache: Path, multi: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a device: nothing is known, and nothing is said."""
    made_from(multi, OLD, "fp32")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    load_bundle("tiny")
    assert not caplog.messages
