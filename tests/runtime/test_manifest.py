"""The manifest: one writer and one reader, and bundles of the version before."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import handmade

from dynamo_runtime import DEFAULT_BUNDLE, Engine, load_bundle
from dynamo_runtime.bundle import list_files
from dynamo_runtime.manifest import FileRecord, Manifest, PassBytes, Quantization, Source, read_manifest
from dynamo_runtime.registry import TOPOLOGIES

KINDS = {"plain": (1, 0), "parallel": (3, 0), "cp": (3, 2), "lookahead": (3, 0)}
VERSION_2 = {
    "plain": {"kind": "plain", "n_heads": 1},
    "parallel": {"kind": "parallel", "n_heads": 3},
    "cp": {"kind": "cp", "n_heads": 1, "n_tokens": 3, "rank": 2},
    "lookahead": {"kind": "lookahead", "n_heads": 1, "n_tokens": 3},
}


def full(kind: str) -> Manifest:
    """A manifest in which every field says something."""
    return Manifest(
        graph="m.onnx",
        topology=handmade.topology_of(kind, *KINDS[kind]),
        model_type="gpt_neox",
        vocab_size=4096,
        tokenizer_size=4000,
        context_length=1024,
        kv_layers=8,
        kv_heads=4,
        head_size=64,
        precision="int8",
        top_k_outputs=64,
        bos_token_id=0,
        eos_token_ids=(0, 7),
        sampling={"temperature": 0.5, "top_k": 40},
        pass_bytes=PassBytes(100, 20),
        quantization=Quantization(
            "int8", {"stem": ["int8, blocks of 32"]}, "int8", {"text": "ours", "tokens": 9}, False, True, {"onnx": "1"}
        ),
        source=Source("model", "GPTNeoXForCausalLM", "inside", {"torch": "2"}),
        files={"m.onnx": FileRecord(9, "ab")},
    )


def test_every_topology_is_tried() -> None:
    assert set(KINDS) == set(TOPOLOGIES)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "dynamo_config.json"
    path.write_text(full(kind).to_json())
    assert read_manifest(path) == full(kind)


def test_a_bundle_writes_what_its_manifest_says(multi: Path, tmp_path: Path) -> None:
    """Where it lies is not among it."""
    bundle = load_bundle(multi)
    (tmp_path / "model.onnx").write_bytes(multi.read_bytes())
    moved = replace(bundle, folder=tmp_path, files=list_files(tmp_path))
    moved.write_manifest()
    assert load_bundle(tmp_path, verify=True) == moved
    assert str(tmp_path) not in (tmp_path / "dynamo_config.json").read_text()


@pytest.mark.parametrize("kind", VERSION_2)
def test_version_2_is_read(tmp_path: Path, kind: str) -> None:
    """There the topology stood among the other fields, and proofs were in the manifest."""
    content = json.loads(full(kind).to_json())
    del content["topology"], content["source"]
    content |= VERSION_2[kind] | {"format_version": 2, "parity": {"passed": True}}
    path = tmp_path / "dynamo_config.json"
    path.write_text(json.dumps(content))
    read = read_manifest(path)
    assert read.topology == full(kind).topology
    assert (read.vocab_size, read.quantization, read.files) == (4096, full(kind).quantization, full(kind).files)


def test_a_bundle_of_version_2_writes_the_same_text(copied) -> None:
    options = {"seed": 1, "max_new_tokens": 20, "strategy": "speculative"}
    expected = Engine(copied.folder, threads=1).generate("def f", **options).tokens
    copied.edit(format_version=2, topology=None, kind="parallel", n_heads=3)
    assert Engine(copied.folder, threads=1).generate("def f", **options).tokens == expected


def test_the_embedded_bundle_has_a_short_manifest() -> None:
    """What proves it lies beside, so that a device need not read it."""
    content = (DEFAULT_BUNDLE / "dynamo_config.json").read_text()
    assert len(content.encode()) < 3500
    report = json.loads((DEFAULT_BUNDLE / "report.json").read_text())
    assert report["parity"]["passed"] and report["gates"]["passed"]
    assert "report.json" in load_bundle(DEFAULT_BUNDLE, verify=True).files
