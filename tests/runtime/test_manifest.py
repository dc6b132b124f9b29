"""The manifest: one writer and one reader, and bundles of the version before."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import handmade

from dynamo_runtime import DEFAULT_BUNDLE, Engine, load_bundle
from dynamo_runtime.bundle import list_files
from dynamo_runtime.errors import BundleError
from dynamo_runtime.manifest import DrafterGraph, FileRecord, Manifest, PassBytes, Quantization, Source, read_manifest
from dynamo_runtime.registry import TOPOLOGIES

KINDS = {"plain": (1, 0), "parallel": (3, 0), "cp": (3, 2), "lookahead": (3, 0)}
VERSION_2 = {
    "plain": {"kind": "plain", "n_heads": 1},
    "parallel": {"kind": "parallel", "n_heads": 3},
    "cp": {"kind": "cp", "n_heads": 1, "n_tokens": 3, "rank": 2},
    "lookahead": {"kind": "lookahead", "n_heads": 1, "n_tokens": 3},
}


def full(kind: str, *, old: bool = False) -> Manifest:
    """A manifest in which every field says something; or one that the versions before the newest have words for."""
    topology = handmade.topology_of(kind, *KINDS[kind])
    return Manifest(
        graph="m.onnx",
        topology=topology,
        drafter=DrafterGraph("d.onnx", 2, 4, 3, kind == "parallel", (7, 0, 9)) if topology.parts and not old else None,
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
            "int8", {"stem": ["int8, blocks of 64"]}, "int8", {"text": "ours", "tokens": 9}, False, True, {"onnx": "1"}
        ),
        source=Source("model", "GPTNeoXForCausalLM", "inside", {"torch": "2"}, {"heads.safetensors": "cd" * 32}),
        files={"m.onnx": FileRecord(9, "ab" * 32)},
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
    for name in bundle.graphs:
        (tmp_path / name).write_bytes(multi.with_name(name).read_bytes())
    moved = replace(bundle, folder=tmp_path, files=list_files(tmp_path))
    moved.write_manifest()
    assert load_bundle(tmp_path, verify=True) == moved
    assert str(tmp_path) not in (tmp_path / "dynamo_config.json").read_text()


@pytest.mark.parametrize("kind", VERSION_2)
@pytest.mark.parametrize("version", [2, 3])
def test_earlier_versions_are_read(tmp_path: Path, kind: str, version: int) -> None:
    """In version 2 the topology stood among the other fields, and proofs were in the manifest; in both, no drafter."""
    expected = full(kind, old=True)
    content = json.loads(expected.to_json()) | {"format_version": version}
    if version == 2:
        del content["topology"], content["source"]
        content |= VERSION_2[kind] | {"parity": {"passed": True}}
    path = tmp_path / "dynamo_config.json"
    path.write_text(json.dumps(content | {"drafter": {"graph": 7}}))  # nobody wrote such a field then
    assert read_manifest(path) == (replace(expected, source=Source()) if version == 2 else expected)


def test_a_vocabulary_is_not_a_line_each(tmp_path: Path) -> None:
    words = tuple(range(0, 8000, 2))
    manifest = replace(full("parallel"), vocab_size=8000, drafter=DrafterGraph("d.onnx", 2, 4, 64, False, words))
    path = tmp_path / "dynamo_config.json"
    path.write_text(manifest.to_json())
    assert read_manifest(path, verify=True) == manifest
    assert len(manifest.to_json().splitlines()) < 100


OLD: dict[str, dict[str, Any]] = {
    "2": {"format_version": 2, "topology": None, "kind": "parallel", "n_heads": 3},
    "3": {},
    "3, heads always": {},
}


@pytest.mark.parametrize("strategy", ["speculative", "auto", "dynamo"])
def test_bundles_of_earlier_versions_write_the_same_text(multi: Path, tmp_path: Path, strategy: str) -> None:
    options = {"seed": 1, "max_new_tokens": 20, "strategy": strategy}
    if strategy != "dynamo":
        options["draft_choice"] = "sample"
    expected = Engine(multi, threads=1).generate("def f", **options).tokens
    for name, changes in OLD.items():
        graph = {"format_version": 3, "skips": "always" not in name, "top_k": 64}
        path = handmade.write_bundle(tmp_path / name, 3, graph=graph)
        manifest = path.with_name("dynamo_config.json")
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))
        assert Engine(path, threads=1).generate("def f", **options).tokens == expected


def test_the_embedded_bundle_has_a_short_manifest() -> None:
    """What proves it lies beside, so that a device need not read it."""
    content = (DEFAULT_BUNDLE / "dynamo_config.json").read_text()
    words = load_bundle(DEFAULT_BUNDLE).drafter
    listed = 0 if words is None or words.vocabulary is None else len(json.dumps(words.vocabulary))
    assert len(content.encode()) < 3700 + listed
    report = json.loads((DEFAULT_BUNDLE / "report.json").read_text())
    assert report["parity"]["passed"] and report["gates"]["passed"]
    assert "report.json" in load_bundle(DEFAULT_BUNDLE, verify=True).files


DEEP = "[" * 200_000 + "]" * 200_000
UNBELIEVABLE: dict[str, tuple[dict[str, Any], str]] = {
    "context": ({"context_length": 10**9}, "field 'context_length' is 1000000000, more than"),
    "layers": ({"kv_layers": 2**33}, "field 'kv_layers' is 8589934592, more than"),
    "cache of one token": ({"kv_layers": 4096, "kv_heads": 4096}, "make 8192 MiB of keys and values for every token"),
    "heads": ({"topology": {"kind": "parallel", "n_heads": 10**6}}, "field 'n_heads' is 1000000, more than"),
    "vocabulary": ({"vocab_size": 10**400}, "field 'vocab_size' is 1000"),
    "true as a number": ({"vocab_size": True}, "field 'vocab_size' is missing or not a int"),
    "end tokens of words": ({"eos_token_ids": ["a"]}, "field 'eos_token_ids' is not a short list of whole numbers"),
    "true as an end token": ({"eos_token_ids": [True]}, "field 'eos_token_ids' is not a short list of whole numbers"),
    "end token below 0": ({"eos_token_ids": [-1]}, "field 'eos_token_ids' is -1, less than 0"),
    "long name": ({"graph": "m" * 300}, "field 'graph' names a file with a name that is too long"),
    "graph elsewhere": ({"graph": "/etc/passwd"}, "field 'graph' names a file outside its folder"),
    "graph without a name": ({"graph": "."}, "field 'graph' names a file with a name that cannot be"),
    "long name in the list": ({"files": {"m" * 300: {"bytes": 1}}}, "lists a file with a name that is too long"),
    "half a character": ({"model_type": "\ud800"}, "field 'model_type' is not valid UTF-8"),
    "long text": ({"model_type": "m" * 5000}, "field 'model_type' is too long"),
    "sampling, a list": ({"sampling": []}, "field 'sampling' is missing or not a dict"),
    "sampling of 400 digits": ({"sampling": {"temperature": 10**400}}, "field 'sampling': temperature must be"),
    "sampling of another type": ({"sampling": {"top_k": "many"}}, "field 'sampling': top_k must be"),
    "files, a list": ({"files": []}, "field 'files' is missing or not a dict"),
    "size below 0": ({"files": {"m.onnx": {"bytes": -1}}}, "field 'bytes' is -1, less than 0"),
    "size a truth": ({"files": {"m.onnx": {"bytes": True}}}, "field 'bytes' is missing or not a int"),
    "a path for a sha256": (
        {"files": {"m.onnx": {"bytes": 9, "sha256": "/../../../pwn"}}},
        "field 'sha256' of m.onnx is not 64 hex digits",
    ),
    "sha256 a number": ({"files": {"m.onnx": {"bytes": 9, "sha256": 7}}}, "field 'sha256' is missing or not a str"),
    "parts of numbers": ({"quantization": {"parts": {"stem": [1]}}}, "field 'stem' is not made of texts"),
    "parts, a text": ({"quantization": {"parts": "int8"}}, "field 'parts' is missing or not a dict"),
    "drafters of numbers": ({"source": {"drafters": {"heads": 2}}}, "field 'drafters' is not made of texts"),
    "versions of numbers": ({"source": {"versions": {"torch": 2}}}, "field 'versions' is not made of texts"),
    "calibration of numbers": ({"quantization": {"calibration": {"text": 1}}}, "field 'text' is missing"),
    "drafter, a list": ({"drafter": []}, "field 'drafter' is missing or not a dict"),
    "drafter's graph elsewhere": (
        {"drafter": {"graph": "/x", "kv_layers": 1, "kv_heads": 1, "top_k_outputs": 1}},
        "field 'graph' names a file outside its folder",
    ),
    "drafter's top-k": (
        {"drafter": {"graph": "d.onnx", "top_k_outputs": 10**9}},
        "'top_k_outputs' is 1000000000, more",
    ),
    "word of the drafter": (
        {"drafter": {"graph": "d.onnx", "top_k_outputs": 1, "vocabulary": [10**400]}},
        "field 'vocabulary' is 1000",
    ),
    "bytes of a pass": ({"pass_bytes": {"plain": 10**400}}, "field 'plain' is 1000"),
}


@pytest.mark.parametrize("case", UNBELIEVABLE)
def test_no_size_and_no_type_is_believed(tmp_path: Path, case: str) -> None:
    """One short line that names file and field, at once, before anything is made of it."""
    changes, message = UNBELIEVABLE[case]
    path = tmp_path / "dynamo_config.json"
    path.write_text(json.dumps(json.loads(full("parallel").to_json()) | changes))
    started = time.perf_counter()
    with pytest.raises(BundleError) as error:
        read_manifest(path)
    assert time.perf_counter() - started < 1
    assert message in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "nested too deeply"),
        ('{"vocab_size": ' + "9" * 10_000 + "}", "is not readable"),
        (" " * (2 << 20), "has more than 1048576 bytes"),
        (b"\xff\xfe", "is not readable"),
    ],
)
def test_no_manifest_at_all(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "dynamo_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BundleError, match=message):
        read_manifest(path)


def test_what_is_unknown_or_null_is_left_alone(tmp_path: Path) -> None:
    content = json.loads(full("plain").to_json()) | {"novelty": [{"a": 10**400}], "quantization": None}
    path = tmp_path / "dynamo_config.json"
    path.write_text(json.dumps(content))
    assert read_manifest(path) == replace(full("plain"), quantization=None)
