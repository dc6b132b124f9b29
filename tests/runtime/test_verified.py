"""Files are read through once, and again when they change; weights lie in the bundle's folder."""

import json
import os
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from dynamo_runtime import BundleError, Engine, bundle, load_bundle
from dynamo_runtime.bundle import list_files


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files that were read through, with an empty cache."""
    monkeypatch.setenv("DYNAMO_CACHE", str(tmp_path / "cache"))
    names: list[str] = []
    sha256 = bundle.sha256
    monkeypatch.setattr(bundle, "sha256", lambda path: (names.append(path.name), sha256(path))[1])
    return names


def test_once_and_after_a_change(copied, read: list[str]) -> None:
    load_bundle(copied.folder)
    assert sorted(read) == ["cooccurrence.npz", "drafter.onnx", "model.onnx", "tokenizer.json"]
    read.clear()
    load_bundle(copied.folder)
    assert read == []
    os.utime(copied.folder / "model.onnx")
    load_bundle(copied.folder)
    assert read == ["model.onnx"]
    load_bundle(copied.folder, verify=True)
    assert len(read) == 5


def test_another_file_under_the_times_of_the_first(copied, read: list[str]) -> None:
    """As tools leave it that copy times along."""
    load_bundle(copied.folder)
    path = copied.folder / "model.onnx"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BundleError, match=r"model.onnx does not have the sha256"):
        load_bundle(copied.folder)


def test_a_manifest_that_says_another_sha256(copied, read: list[str]) -> None:
    load_bundle(copied.folder)
    files = json.loads((copied.folder / "dynamo_config.json").read_text())["files"]
    files["model.onnx"]["sha256"] = "0" * 64
    copied.edit(files=files)
    with pytest.raises(BundleError, match=r"model.onnx does not have the sha256"):
        load_bundle(copied.folder)


@pytest.mark.parametrize("content", ["", "[" * 100_000, '{"model.onnx": 7}', "[]"])
def test_a_record_of_nonsense_costs_time_only(copied, read: list[str], tmp_path: Path, content: str) -> None:
    load_bundle(copied.folder)
    (record,) = (tmp_path / "cache" / "verified").iterdir()
    record.write_text(content)
    read.clear()
    assert load_bundle(copied.folder).files and len(read) == 4


def test_no_cache_costs_time_only(copied, read: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    load_bundle(copied.folder)
    load_bundle(copied.folder)
    assert len(read) == 8


def test_the_cache_does_not_grow_for_ever(copied, read: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dynamo_runtime.verified._MOST_BUNDLES", 2)
    for name in "abc":
        load_bundle(copied.folder.rename(copied.folder.with_name(name)))
        copied.folder = copied.folder.with_name(name)
    assert len(list((tmp_path / "cache" / "verified").iterdir())) == 2


def test_verify_covers_the_manifest(copied) -> None:
    """If it was written with its own sha256."""
    load_bundle(copied.folder, verify=True)
    whole = load_bundle(copied.folder)
    whole.write_manifest()
    assert load_bundle(copied.folder, verify=True) == whole
    copied.edit(context_length=639)
    assert load_bundle(copied.folder).context_length == 639
    with pytest.raises(BundleError, match="does not have the sha256 that it says"):
        load_bundle(copied.folder, verify=True)


def test_verify_needs_a_sha256(copied) -> None:
    files = json.loads((copied.folder / "dynamo_config.json").read_text())["files"]
    del files["tokenizer.json"]["sha256"]
    copied.edit(files=files)
    load_bundle(copied.folder)
    with pytest.raises(BundleError, match=r"tokenizer.json cannot be verified"):
        load_bundle(copied.folder, verify=True)


def test_a_link_out_needs_a_sha256(copied, tmp_path: Path) -> None:
    """As caches of downloads have them; but the sum has to be right."""
    elsewhere = (copied.folder / "tokenizer.json").rename(tmp_path / "elsewhere")
    (copied.folder / "tokenizer.json").symlink_to(elsewhere)
    load_bundle(copied.folder, verify=True)
    files = json.loads((copied.folder / "dynamo_config.json").read_text())["files"]
    files["tokenizer.json"]["sha256"] = ""
    copied.edit(files=files)
    with pytest.raises(BundleError, match="is a link out of the bundle"):
        load_bundle(copied.folder)


def with_weights_in(folder: Path, location: str) -> None:
    """Puts the weights of a bundle into a file of their own, and has the graph look for them elsewhere."""
    path = folder / "model.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    replace(load_bundle_unchecked(folder), files=list_files(folder)).write_manifest()


def load_bundle_unchecked(folder: Path) -> bundle.Bundle:
    files = bundle.read_manifest(folder / "dynamo_config.json")
    return bundle.Bundle(folder=folder, **{name: getattr(files, name) for name in files.__dataclass_fields__})


def test_weights_beside_the_graph(copied) -> None:
    with_weights_in(copied.folder, "model.onnx.data")
    assert Engine(copied.folder, threads=1).generate("def", max_new_tokens=3).tokens


@pytest.mark.parametrize("location", ["../elsewhere", "/etc/hostname", "*/_ORT_MEM_ADDR_/*", "not there", "m" * 5000])
def test_weights_that_are_not_listed(copied, location: str) -> None:
    with_weights_in(copied.folder, location)
    with pytest.raises(BundleError, match=r"has weights in .*, which dynamo_config.json does not list") as error:
        load_bundle(copied.folder)
    assert len(str(error.value)) < 400


def test_weights_behind_a_link(copied, tmp_path: Path) -> None:
    with_weights_in(copied.folder, "model.onnx.data")
    weights = (copied.folder / "model.onnx.data").rename(tmp_path / "elsewhere")
    (copied.folder / "model.onnx.data").symlink_to(weights)
    with pytest.raises(BundleError, match="which lies outside the bundle's folder"):
        load_bundle(copied.folder)
