"""From bundle to bundle: what is touched, what is refused, what is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import handmade
from support.naive import graph_paths, initializers, outputs

from dynamo_graph.files import read_report
from dynamo_graph.read import places
from dynamo_graph.write import write_model
from dynamo_quantize import Options, QuantizeError, WriteError, gates, quantize, quantize_bundle, texts
from dynamo_quantize.gates import GateResult
from dynamo_quantize.texts import pieces
from dynamo_runtime.bundle import Bundle, list_files, load_bundle
from dynamo_runtime.corpus import Document

ExportOf = Callable[[str], Any]
TOKENS = np.random.default_rng(0).integers(1, 320, 24).tolist()
CHANGED = ("folder", "pass_bytes", "graph", "precision", "files", "quantization")
ROWS = [GateResult("quality", "PPL_1", 4.0, 4.5, 4.1, False), GateResult("size", "all files, MB", 2.0, 1.0)]


def contents(folder: Path) -> dict[str, str]:
    """Hashes of every file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def without_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and all is well."""
    monkeypatch.setattr(gates, "measure", lambda *arguments: None)
    monkeypatch.setattr(gates, "judge", lambda *arguments, **options: ROWS[1:])


@pytest.fixture
def failing_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and a perplexity is too high."""
    monkeypatch.setattr(gates, "measure", lambda *arguments: None)
    monkeypatch.setattr(gates, "judge", lambda *arguments, **options: ROWS)


@pytest.mark.parametrize(("name", "scheme"), [("parallel", "int8"), ("cp", "int4"), ("lookahead", "fp16")])
def test_a_smaller_bundle(
    name: str, scheme: str, export: ExportOf, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It passes its gates, is whole, runs, has everything its source has, and the source is untouched."""
    source = export(name)
    before = contents(source.folder)
    options = Options(perplexity_limit=60.0, tokens_per_pass_limit=60.0)  # random weights suffer more than trained ones
    graph = quantize_bundle(
        source.folder, tmp_path / "out" / "small.onnx", scheme, options, calibration=text, gate_text=text
    )
    assert contents(source.folder) == before
    assert graph == tmp_path / "out" / "small.onnx" and [path.name for path in tmp_path.iterdir()] == ["out"]
    bundle = load_bundle(graph, verify=True)
    assert set(contents(bundle.folder)) == set(before) - {"model.onnx"} | {"small.onnx"}
    changed = {"model.onnx", "drafter.onnx", "dynamo_config.json", "genai_config.json", "report.json"}
    after = contents(bundle.folder)
    assert all(after[file] == digest for file, digest in before.items() if file not in changed)
    decoder = [
        json.loads((f / "genai_config.json").read_text())["model"]["decoder"] for f in (graph.parent, source.folder)
    ]
    assert decoder[0] == decoder[1] | {"filename": "small.onnx"}
    assert replace(bundle, **{name: None for name in CHANGED}) == replace(
        source.bundle, **{name: None for name in CHANGED}
    )
    assert (bundle.precision, bundle.lossless, bundle.degraded) == (scheme, True, False)
    made, report = bundle.quantization, read_report(bundle.folder)
    assert made is not None and made.kv_cache == ("fp16" if scheme == "fp16" else "int8")
    assert made.calibration == (None if scheme == "fp16" else {"text": "code.py", "tokens": 6 * 96})
    assert report["parity"] == read_report(source.folder)["parity"]
    judged = report["gates"]
    assert judged["limits_percent"] == {"perplexity": 60.0, "tokens_per_pass": 60.0}
    assert judged["passed"] and judged["scored_tokens"] == 2 * 48
    assert (graph.parent / "dynamo_config.json").stat().st_size < 4096
    printed = capsys.readouterr().out.splitlines()
    printed = printed[printed.index("measured on code.py") + 2 :]  # behind the parity of an export, if there was one
    assert judged["text"] == "code.py"
    assert [row["figure"] for row in judged["rows"]] == [line[12:58].strip() for line in printed]
    assert {row["gate"] for row in judged["rows"]} == {"width", "quality", "acceptance", "size"}
    assert outputs(bundle, TOKENS)["logits"].shape == (24, 320)
    weights = {b.folder: initializers(*graph_paths(b)) for b in (bundle, source.bundle)}
    saved = [sum(array.nbytes for array in arrays.values()) for arrays in weights.values()]
    assert saved[0] < saved[1] * {"int8": 0.4, "int4": 0.35, "fp16": 0.6}[scheme]


@pytest.mark.usefixtures("without_gates")
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_weights_in_a_file_of_their_own(scheme: str, export: ExportOf, text: Path, tmp_path: Path) -> None:
    """Such a source is read, such a bundle is written, and both make no difference to the numbers."""
    source, beside = export("cp").folder, tmp_path / "beside"
    _with_external_data(source, beside)
    made = []
    for number, (given, external) in enumerate([(source, False), (source, True), (beside, True), (beside, False)]):
        graph = tmp_path / str(number) / "m.onnx"
        quantize_bundle(given, graph, scheme, calibration=text, gate_text=text, external_data=external)
        bundle = load_bundle(graph, verify=True)
        assert set(bundle.files) == set(contents(graph.parent)) - {"dynamo_config.json"}
        assert "model.onnx.data" not in bundle.files
        assert {"m.onnx.data", "drafter.onnx.data"} & {*bundle.files} == (
            {"m.onnx.data", "drafter.onnx.data"} if external else set()
        )
        assert (graph.stat().st_size < 90_000) == external
        made.append(outputs(bundle, TOKENS))
    for other in made[1:]:
        for output, array in made[0].items():
            np.testing.assert_array_equal(other[output], array)


def _with_external_data(source: Path, to: Path) -> None:
    """A copy of a bundle whose weights lie beside the graph, as the exporter writes them."""
    shutil.copytree(source, to)
    models = {name: ir.load(source / name) for name in ("model.onnx", "drafter.onnx")}
    for name, model in models.items():
        (to / name).unlink()
        shared = {} if name == "model.onnx" else places(to / "model.onnx")
        write_model(model, to / name, True, shared)
    copied = load_bundle(source)
    replace(copied, folder=to, files=list_files(to)).write_manifest()


@pytest.mark.usefixtures("failing_gates")
def test_a_failed_gate_leaves_nothing(export: ExportOf, text: Path, tmp_path: Path) -> None:
    """The complaint names the figure, its value and its limit; there is no file and no folder, nor a hidden one."""
    with pytest.raises(QuantizeError, match=r"1 of the 1 limits .*PPL_1, 4\.5 where 4\.1 is allowed.*--allow-degraded"):
        quantize_bundle(export("cp").folder, tmp_path / "out" / "m.onnx", "fp16", gate_text=text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("failing_gates")
def test_a_failed_gate_keeps_an_earlier_bundle(export: ExportOf, text: Path, tmp_path: Path) -> None:
    """Overwriting begins when the gates are passed."""
    graph = tmp_path / "out" / "m.onnx"
    quantize_bundle(export("cp").folder, graph, "fp16", gate_text=text, allow_degraded=True)
    before = contents(graph.parent)
    with pytest.raises(QuantizeError, match="PPL_1"):
        quantize_bundle(export("cp").folder, graph, "fp16", gate_text=text, overwrite=True)
    assert contents(graph.parent) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("gate", "lossless"), [("quality", True), ("width", False)])
def test_degraded(
    gate: str, lossless: bool, export: ExportOf, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was allowed is marked in the manifest; a width that does not hold also takes the claim of losslessness."""
    monkeypatch.setattr(gates, "measure", lambda *arguments: None)
    rows = [GateResult(gate, "figure", 1.0, 2.0, 1.5, False)]
    monkeypatch.setattr(gates, "judge", lambda *arguments, **options: rows)
    graph = quantize_bundle(export("cp").folder, tmp_path / "m.onnx", "fp16", gate_text=text, allow_degraded=True)
    bundle = load_bundle(graph, verify=True)
    assert (bundle.degraded, bundle.lossless) == (True, lossless)
    judged = read_report(bundle.folder)["gates"]
    assert not judged["passed"]
    assert judged["rows"] == [
        {"gate": gate, "figure": "figure", "reference": 1.0, "value": 2.0, "limit": 1.5, "passed": False}
    ]


def test_a_perplexity_that_really_rises(export: ExportOf, text: Path, tmp_path: Path) -> None:
    """4 bits by rounding in large blocks cost a random model more than no loss at all allows."""
    options = Options(algorithm="rtn", block_size=128, perplexity_limit=0.0, tokens_per_pass_limit=100.0)
    arguments: dict[str, Any] = {"options": options, "calibration": text, "gate_text": text}
    with pytest.raises(QuantizeError, match=r"limits are not kept \(first: PPL_"):
        quantize_bundle(export("parallel").folder, tmp_path / "m.onnx", "int4", **arguments)
    assert list(tmp_path.iterdir()) == []
    graph = quantize_bundle(export("parallel").folder, tmp_path / "m.onnx", "int4", allow_degraded=True, **arguments)
    assert load_bundle(graph).degraded


@pytest.mark.usefixtures("without_gates")
@pytest.mark.parametrize(("scheme", "options"), [("int8-dynamic", Options()), ("int8", Options(block_size=128))])
def test_what_is_not_lossless(scheme: str, options: Options, export: ExportOf, text: Path, tmp_path: Path) -> None:
    """Whatever the gates say."""
    source = export("cp").folder
    graph = quantize_bundle(source, tmp_path / "m.onnx", scheme, options, calibration=text, gate_text=text)
    assert not load_bundle(graph).lossless and not load_bundle(graph).degraded


@pytest.mark.usefixtures("without_gates")
def test_overwrite_rules(export: ExportOf, text: Path, tmp_path: Path) -> None:
    """Refuse first; then replace the whole folder, and only if all in it was ours."""
    out = tmp_path / "out"
    source = export("cp").folder
    quantized: dict[str, Any] = {"gate_text": text}
    quantize_bundle(source, out / "m.onnx", "fp16", external_data=True, **quantized)
    before = contents(out)
    assert "m.onnx.data" in before
    with pytest.raises(WriteError, match="already exists: pass --overwrite"):
        quantize_bundle(source, out / "m.onnx", "fp16", **quantized)
    with pytest.raises(WriteError, match=r"already holds the bundle m\.onnx"):
        quantize_bundle(source, out / "other.onnx", "fp16", overwrite=True, **quantized)
    assert contents(out) == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"notes\.txt was not written by an earlier export"):
        quantize_bundle(source, out / "m.onnx", "int8-dynamic", overwrite=True, **quantized)
    (out / "notes.txt").unlink()
    assert contents(out) == before
    quantize_bundle(source, out / "m.onnx", "int8-dynamic", overwrite=True, **quantized)
    assert load_bundle(out, verify=True).precision == "int8-dynamic"
    assert "m.onnx.data" not in contents(out) and [path.name for path in tmp_path.iterdir()] == ["out"]


def _copy(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


def _edited(source: Path, to: Path, **changes: Any) -> Path:
    _copy(source, to)
    manifest = json.loads((to / "dynamo_config.json").read_text())
    (to / "dynamo_config.json").write_text(json.dumps(manifest | {"sha256": None} | changes))
    return to


def _without_graph(source: Path, to: Path) -> Path:
    (_copy(source, to) / "model.onnx").unlink()
    return to


def _truncated(source: Path, to: Path) -> Path:
    graph = _copy(source, to) / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-7])
    return to


def _changed(source: Path, to: Path) -> Path:
    graph = _copy(source, to) / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-7] + b"changed")
    return to


def _changed_drafter(source: Path, to: Path) -> Path:
    graph = _copy(source, to) / "drafter.onnx"
    graph.write_bytes(graph.read_bytes()[:-7] + b"changed")
    return to


def _without_tokenizer(source: Path, to: Path) -> Path:
    (_copy(source, to) / "tokenizer.json").unlink()
    manifest = json.loads((to / "dynamo_config.json").read_text())
    del manifest["files"]["tokenizer.json"], manifest["sha256"]
    (to / "dynamo_config.json").write_text(json.dumps(manifest))
    return to


def _with_file(source: Path, to: Path, name: str, content: str) -> Path:
    handmade.add_file(_copy(source, to), name, content)
    return to


BAD_SOURCES: list[tuple[str, Callable[[Path, Path], Path], str]] = [
    (
        "quantized",
        lambda source, to: _edited(source, to, precision="int8"),
        "is int8 already: quantize the bundle in fp32",
    ),
    ("absent", lambda source, to: to, "does not exist"),
    ("no manifest", lambda source, to: source.parent / "checkpoint", "is not a bundle, or only half of one"),
    ("no graph", _without_graph, "model.onnx is missing"),
    ("truncated", _truncated, "truncated or changed"),
    ("changed", _changed, "does not have the sha256 in the manifest"),
    ("changed drafter", _changed_drafter, "drafter.onnx does not have the sha256 in the manifest"),
    (
        "format 3",
        lambda source, to: _edited(source, to, format_version=3, drafter=None, kv_layers=3),
        "has its heads in the base's graph, as earlier versions did: export it again",
    ),
    ("other graph", lambda source, to: _copy(source, to) / "tokenizer.json", "is not the graph of the bundle"),
    ("no tokenizer", _without_tokenizer, "tokenizer.json is missing"),
    (
        "other interop",
        lambda source, to: _with_file(source, to, "genai_config.json", '{"model": 7}'),
        "genai_config.json does not say which graph it is about",
    ),
    ("report", lambda source, to: _with_file(source, to, "report.json", "[" * 200_000), "report.json is not readable"),
    ("layers", lambda source, to: _edited(source, to, kv_layers=3), "has attention layers [0, 1] where 3 are"),
]


@pytest.mark.parametrize(("make", "complaint"), [case[1:] for case in BAD_SOURCES], ids=[c[0] for c in BAD_SOURCES])
def test_bad_sources(
    make: Callable[[Path, Path], Path], complaint: str, export: ExportOf, text: Path, tmp_path: Path
) -> None:
    """One line, and nothing is written."""
    source = make(export("cp").folder, tmp_path / "source")
    with pytest.raises(WriteError) as found:
        quantize_bundle(source, tmp_path / "out" / "m.onnx", "fp16", gate_text=text)
    assert complaint in str(found.value) and "\n" not in str(found.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


@pytest.mark.parametrize("argument", ["calibration", "gate_text"])
def test_bad_texts(argument: str, export: ExportOf, text: Path, tmp_path: Path) -> None:
    """No such file, and one that is too short, are refused; the second says how much text there should be."""
    given_texts: dict[str, Any] = {"calibration": text, "gate_text": text}
    (tmp_path / "short.txt").write_text("x = 1\n")
    for given, complaint in (("absent.txt", "no text at"), ("short.txt", r"short\.txt has no text of \d+ tokens")):
        with pytest.raises(QuantizeError, match=complaint):
            quantize_bundle(
                export("cp").folder, tmp_path / "o" / "m.onnx", "int8", **given_texts | {argument: tmp_path / given}
            )
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    with pytest.raises(QuantizeError, match="no text at"):
        quantize.check_request("int8", **given_texts | {argument: tmp_path / "absent.txt"})
    quantize.check_request("int8", **given_texts)


def test_the_drafters_graph_keeps_its_name(export: ExportOf, text: Path, tmp_path: Path) -> None:
    """So the base's cannot have it."""
    with pytest.raises(QuantizeError, match=r"drafter\.onnx is what the graph of further heads is called"):
        quantize_bundle(export("cp").folder, tmp_path / "out" / "drafter.onnx", "fp16", gate_text=text)
    assert list(tmp_path.iterdir()) == []


def test_into_the_source(export: ExportOf, text: Path, tmp_path: Path) -> None:
    """The bundle that is quantized is never replaced, by whatever name its folder goes."""
    source = _copy(export("cp").folder, tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    for folder in ("source", "link"):
        with pytest.raises(WriteError, match="is the bundle that is to be quantized: choose another folder"):
            quantize_bundle(source, tmp_path / folder / "model.onnx", "fp16", gate_text=text, overwrite=True)
    with pytest.raises(WriteError, match="is the bundle that is to be quantized"):
        quantize_bundle(source, tmp_path / "source" / "small.onnx", "fp16", gate_text=text)
    assert contents(source) == before


def test_pieces_of_text(export: ExportOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are of one length, within a document, spread over the text, and no more than asked for."""
    bundle: Bundle = export("cp").bundle
    for i in range(3):
        (tmp_path / f"{i}.py").write_text(f"value = {i}\n" * 20 * (i + 1))
    tokens = [bundle.tokenizer.encode((tmp_path / f"{i}.py").read_text()).ids for i in range(3)]
    everything = [found[at : at + 10] for found in tokens for at in range(0, len(found) - 9, 10)]
    assert pieces(bundle, tmp_path, 1000, 10, held_out=True) == everything
    few = pieces(bundle, tmp_path, 4, 10, held_out=True)
    assert len(few) == 4 and few[0] == everything[0] and all(piece in everything for piece in few)
    wanted = []

    def standard_library(held_out: bool) -> Iterator[Document]:
        wanted.append(held_out)
        yield Document("m", "m", (tmp_path / "2.py").read_text())

    monkeypatch.setattr(texts, "standard_library", standard_library)
    for held_out in (True, False):
        assert pieces(bundle, None, 1, 10, held_out) == [tokens[2][:10]]
    assert wanted == [True, False]


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnxscript", "optimum", "safetensors"):
    sys.modules[name] = None
from dynamo_quantize import gates, quantize
from dynamo_export import cli
for name, size in {"CALIBRATION_PIECES": 2, "TEXTS": 1, "TEXT_TOKENS": 24, "WIDTHS": 1, "WIDTH_TOKENS": 8,
                   "PROMPTS": 1, "PROMPT_TOKENS": 4, "NEW_TOKENS": 4}.items():
    setattr(quantize, name, size)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_without_torch(export: ExportOf, text: Path, tmp_path: Path) -> None:
    """The command quantizes a bundle where torch and the rest of the exporter's libraries cannot be imported."""
    graph = tmp_path / "out" / "m.onnx"
    arguments = [str(graph), "-m", str(export("lookahead").folder), "--quantize", "int8", "--max-perplexity-loss", "90"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments, "--calibration", str(text), "--gate-text", str(text)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bundle = load_bundle(graph, verify=True)
    rows = {row["figure"]: row for row in read_report(bundle.folder)["gates"]["rows"]}
    if sys.platform.startswith("linux"):  # here the memory was really measured, in a process of its own
        assert 1 < rows["peak memory, MB"]["value"] < 500
